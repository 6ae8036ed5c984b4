"""What several test modules share; fixtures stand in the ``conftest.py`` of their folder."""
