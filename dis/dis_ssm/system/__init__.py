"""What any program needs, whatever it computes."""
