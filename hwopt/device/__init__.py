"""Devices: a small daemon on the board, and tuning, timing and questions from here over TVM's RPC.

daemon.cc, measure.c  what runs there: the daemon, and the timing loop that every uploaded batch is linked with
build     the daemon for a machine, with the two TVM libraries that it needs
link      addresses, secrets, trackers, handshakes: everything that could block for ever, with an end
pump      passes bytes between TVM's client and a link
session   a TVM session over a link
worker    the process that talks to the device and may be killed; runner looks after it
runner    measures batches of candidates there; tells crashes and hangs of a candidate from those of the device
bench     an artifact's library, timed there
probe     its memories, its clock and the rates of its products
profile   a target file of those and of kernels measured there
watchdog  an end for calls of TVM's that would wait for ever

The protocol runs uploaded code with the daemon's rights: it listens on loopback, or asks for a shared secret.
"""
