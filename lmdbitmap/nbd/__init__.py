"""NBD and the control socket: the parts that both ends of a connection share."""
