"""Ray: workers on this machine or a cluster, submitted jobs, and the code that travels to them."""
