"""Linear probe: a head fitted on the vectors of the frozen model; the baseline of every classifier."""
