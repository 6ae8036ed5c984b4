"""Tasks to clients and updates back: the transport protocol, the in-process transport, the wire format."""
