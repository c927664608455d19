"""Loading models into Graphs and saving them."""
