"""A disk behind another NBD server, as a device. From the outside inwards:

    device                 what the rest of the program sees
    conversation           requests that outlive a broken connection: sent again, or failed in the end
    link                   one connection: many requests in flight, and which thread receives
    dial, handshake, tls   how a connection is made
    flushes, unflushed, doubts   failed flushes; changes not flushed yet; ranges that may change yet
    statuses, kept_question, windows, edges, errors   block status; requests sent together; parts of blocks; errors

The client has no thread of its own: conversation.py says which thread receives.
"""
