"""What the three systems are worth: needle accuracy, held-out loss, and a report of both."""
