"""The guest's door: serves disks over NBD. From a client's arrival inwards:

    server      listens, and gives each client a visit
    visit       one client: its handshake, then its connection
    handshake   what is agreed on; what a connection is from then on is a form (forms.py)
    rounds      which thread serves which connection
    connection  the hot loop: requests in, operations done, replies out
    disk_operations  writes and flushes; commands.py has what is rare
    receiving, splicing, replies              bytes in, large ones past our memory, bytes out
    contexts                             what is asked about blocks; dirty_ and kept_context.py answer
    traffic, quiet, notice, complaints   what was carried, who is busy, who will wait, what is logged

One thread serves all connections that are quick, in turns: rounds.py says how, and connection.py what a turn is.
"""
