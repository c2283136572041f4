"""Numbers in the README's sentences that look measured and come from nowhere: a test wants none."""

from __future__ import annotations

import re

WORDS = "one|two|three|four|five|six|seven|eight|nine|ten|twenty|thirty|sixty|hundred|thousand"
MEASURED = re.compile(
    rf"""
    \d+\.\d+ (?:\s?[%×])?                                                   # a decimal
    | \d+e[-−]?\d+                                                         # a power of ten
    | \d+\s?(?: % | ×(?!\s?\d) | (?:[mµ]?s|min|h|[KMG]i?B|[MGT]FLOPS?|M|B)\b )  # a share, a ratio, a unit
    | \b(?:\d+|{WORDS}|half\ an?|an?\ few|several)\s(?:(?:milli|micro)?seconds?|minutes?|hours?|times|percent)\b
    | \ban?\s(?:minute|hour)\b
    """,
    re.VERBOSE,
)
NOT_PROSE = (
    re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE),  # code
    re.compile(r"<!-- results: \w+ -->.*?<!-- end -->", re.DOTALL),  # generated
    re.compile(r"\]\([^)]*\)"),  # where a link leads
)
ALLOWED = {
    r"arXiv \d{4}\.\d{4,5}": "the number of a paper",
    r"Python ≥ 3\.10": "a version that pyproject.toml asks for",
    r"torch ≥ 2\.10": "a version that pyproject.toml asks for",
    r"Apache-2\.0": "the license",
    r"Llama 3\.1 8B to Mistral 7B": "names of models",
    r"The paper reports 1\.8×": "what a cited paper says",
    r"σ\(−2\) ≈ 0\.119": "a value of a function",
}


def unsourced(text: str) -> list[str]:
    """What looks measured in the sentences and tables that are written by hand."""
    for pattern in NOT_PROSE:
        text = pattern.sub(" ", text)
    text = " ".join(text.split())
    for allowed in ALLOWED:
        text = re.sub(allowed, " ", text)
    return [match[0] for match in MEASURED.finditer(text)]
