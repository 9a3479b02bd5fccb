"""The Linux side: durable files, locks, system calls, and what /proc and /sys know of devices."""
