"""Reports: lines with verdicts, of runs, posteriors and bridges."""
