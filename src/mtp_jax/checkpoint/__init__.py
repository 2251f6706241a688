"""What a run writes down to go on from; the door to Orbax."""
