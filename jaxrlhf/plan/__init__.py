"""Memory, time and cost of PPO on a cluster before it is rented: `jaxrlhf plan`."""
