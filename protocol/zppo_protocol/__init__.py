"""The words actors exchange, how they become bytes, and the rules of who may send what.

`messages` are the verbs, `values` and `samples` what they carry (`samples` has the arrays, and what
makes them consistent), `codec` their bytes, `limits` their bounds, `leases` and `credits` the pure
bookkeeping of work that was given out, `keys` who may speak, `doors` how that is found out and
`sockets` the line itself (the three files that import zmq). Invariant: nothing in this package
imports torch or any other package of the project; numpy, msgspec and pyzmq are all that it needs.
"""
