"""What a config costs and whether it does what it says: certify, plan, traffic, benchmark."""
