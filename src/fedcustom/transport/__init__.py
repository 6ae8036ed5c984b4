"""Tasks to clients and updates back: the protocol, transports in this process and on workers, wire format."""
