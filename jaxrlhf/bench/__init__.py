"""Speed of the programs that training runs, against the hardware's limit and against peers in the same run."""
