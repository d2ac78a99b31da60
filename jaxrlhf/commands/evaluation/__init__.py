"""`jaxrlhf eval`: responses side by side, reward models on pairs, verifiable answers, lm-eval's tasks."""
