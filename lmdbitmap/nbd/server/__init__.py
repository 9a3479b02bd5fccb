"""The NBD server: serves disks to guests. From a client's arrival inwards:

    server                          listens, and creates a visit for each client
    visit                           one client: its handshake, then its connection
    handshake                       option haggling; its outcome picks the form of requests and replies (forms.py)
    rounds                          which thread serves which connection
    connection                      the hot loop: requests in, operations done, replies out
    inbox, receiving                bytes in
    batch, long_writes              plain requests done together; WRITEs done as their data arrives
    disk_operations, commands       writes and flushes for these; the rare requests
    replies, splicing, trial        READs and bytes out; large ones past our memory, where that is faster
    contexts                        block status; dirty_contexts.py and kept_context.py answer
    traffic, quiet, notice          counters, whether guests are idle, announced waits
    complaints                      what is logged of clients

One thread serves all connections that are quick, in turns: rounds.py says how, and connection.py what a turn is.
"""
