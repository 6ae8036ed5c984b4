"""Site of a deployed run: an owner of data with its memory, its policy and its audit log."""
