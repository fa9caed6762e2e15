"""What a file is worth: accuracy, speed, explanation, and the choice among files."""
