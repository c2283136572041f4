"""The README: short, honest, and every snippet and link in it works."""

from __future__ import annotations

import re

import pytest
import torch

from commands import ROOT
from xlayer_ext import functional, reference

README = (ROOT / "README.md").read_text()
MAX_LINES = 150
MEASURED = re.compile(r"\d+\.\d+|\d+\s?(?:%|×|[mµ]?s\b|[KMG]i?B\b|[GT]FLOP)")
ALLOWED = ("Python ≥ 3.10", "torch ≥ 2.10", "Apache-2.0")  # versions and a name


def test_it_is_short_and_holds_no_generated_parts() -> None:
    assert len(README.splitlines()) <= MAX_LINES
    assert "<!--" not in README


def test_no_number_in_it_is_typed_by_hand() -> None:
    text = re.sub(r"```.*?```|\]\([^)]*\)", " ", README, flags=re.DOTALL)
    for allowed in ALLOWED:
        assert allowed in text
        text = text.replace(allowed, "")
    assert MEASURED.findall(text) == []


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_its_figure_is_one_of_those_that_are_generated() -> None:
    from benchmarks.pages.__main__ import generated

    (figure,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert figure in {str(path) for path in generated()}


@pytest.mark.parametrize("number", range(README.count("```python")))
def test_its_snippets_run(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Instead of downloaded weights, small models of the same kinds, and fewer tokens for the first.
    from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    encoder, decoder = RobertaConfig(vocab_size=50, **small), LlamaConfig(vocab_size=50, **small)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda _name: RobertaModel(encoder))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _name: LlamaForCausalLM(decoder))
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    with torch.random.fork_rng():
        exec(compile(code.replace("128", "16"), f"README snippet {number}", "exec"), {})


def test_the_matrix_of_support_has_ticks_alone_and_names_operators() -> None:
    matrix = README.split("## What is supported")[1].split("\n\n")[1].splitlines()
    assert {cell.strip() for row in matrix[2:] for cell in row.strip("|").split("|")[1:]} == {"✓", ""}
    operators = [name for row in matrix[2:] for name in re.findall(r"`(\w+)`", row)]
    assert operators and set(operators) <= set(functional.__all__) & set(reference.__all__)
