"""Writes docs/performance.md, docs/studies.md and their figures from the committed results: `make results`.

``facts``        numbers that the code holds: sizes of cases, settings of runs, limits of kernels
``text``         numbers and tables in Markdown
``figures``      bars, intervals and lines as SVG
``performance``  the page of the kernels
``studies``      the page of the systems
"""
