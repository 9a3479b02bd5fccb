"""Tracking of a disk while it is written, and whether its bitmap can be trusted.

    masks, armed, arming, period, lane, tracking a write: how its dirt becomes durable, and the gate that it passes
    points, chain                                checkpoints, and what happens when one is made or forgotten
    snapshot, holding, scratch, cluster_states   a disk held as it was at a checkpoint
    session, continuity                          how an owner's session begins, and whether the image is unchanged
    vouching, flushing                           the owner's sign of life, and when track is lost
    changes, standalone, front                   what changed; stand-alone bitmaps; the interface for a server

`filter.py`, beside this folder, is the public interface.
"""
