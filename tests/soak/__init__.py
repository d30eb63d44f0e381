"""The soak: real agents, clients and faults at random for as long as one likes, and then an account of everything."""
