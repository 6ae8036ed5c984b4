"""One owner of data in a deployed run: its data, its memory, its policy and its audit log."""
