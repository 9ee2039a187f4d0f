"""The fair comparison: a suite in, one result file a run out."""
