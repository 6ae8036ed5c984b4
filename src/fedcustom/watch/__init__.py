"""A local web page of runs that are under way or finished: the report's plots and tables, kept up to date."""
