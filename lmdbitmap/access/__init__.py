"""How a job gets at disks, whoever has them: at rest, attached here, or served by another process."""
