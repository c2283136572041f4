"""Tables, intervals and plots for reports."""
