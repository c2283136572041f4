"""One run of all families and its report: curves, errors, bounds, plots and the HTML page."""
