"""A disk behind another NBD server, as a device. From the outside inwards:

    device                 what the rest of the program sees
    session                requests that outlive a broken connection: sent again, or failed in the end
    link                   one connection: many requests in flight, and whose turn it is to receive
    dial, handshake, tls   how one is made
    flushes, doubts        what was acknowledged and not flushed; what may happen yet
    statuses, kept, kept_question, windows, errors, edges   questions about blocks, and their answers

There is no thread of its own: conversation.py says who receives.
"""
