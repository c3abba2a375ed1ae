"""What a run will need of a cluster, worked out before one is booked."""
