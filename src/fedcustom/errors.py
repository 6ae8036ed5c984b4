"""What goes wrong for reasons a user can mend."""


class FedcustomError(Exception):
    """Something a user can mend: one line that says what, where and what is allowed. Commands exit with code 2."""


class RecipeError(FedcustomError):
    """A setting is unknown, of the wrong type or impossible."""


class DataError(FedcustomError):
    """A source cannot be read, a row is malformed, a client has nothing to train on."""


class ModelError(FedcustomError):
    """A base model cannot be loaded, or a method does not fit it."""


class WireError(FedcustomError):
    """A message is truncated, malformed or larger than allowed."""


class UpdateError(FedcustomError):
    """A client's update has the wrong names, shapes or dtypes, or numbers that are not finite."""


class RunError(FedcustomError):
    """A run cannot start, go on or be read."""
