"""A disk while it is written, and whether what is known about it is true.

    armed, period, lane, tracking                a write: what makes its dirt durable, and the gate that it passes
    points, chain                                checkpoints, and what follows when one is made or forgotten
    snapshot, holding, scratch, cluster_states   a disk held as it was at a checkpoint
    session, continuity                          how owning a disk begins, and what is believed of its image
    vouching, flushing                           the owner's word, and when it is taken back
    changes, standalone, front                   what changed; bitmaps of their own; what a server uses

`filter.py`, beside this folder, is its face.
"""
