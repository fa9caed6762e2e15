"""Article 3.2, quantisation: weights as integers, and training that expects it."""
