"""What tests share: things to try the tracker on, peers that do as they are told, and second implementations."""
