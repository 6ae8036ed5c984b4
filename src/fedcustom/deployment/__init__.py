"""The same recipe across organisations: provisioning, the server's run, sites, local try-outs."""
