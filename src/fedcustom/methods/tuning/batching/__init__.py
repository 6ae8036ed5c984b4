"""Training many clients in one batch, with the result of training them one by one."""
