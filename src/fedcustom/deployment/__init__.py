"""A recipe across sites: a federation's folder, its server, and a run that outlives what fails."""
