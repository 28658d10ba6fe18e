"""Tables and plots of an evaluation's results."""
