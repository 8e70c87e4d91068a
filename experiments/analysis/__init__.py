"""Read finished curves and say what they show: tables, verdicts, figures, pages. Never imports torch."""
