"""A game of several turns: `--environment examples/environments/guess_number.py:GuessNumber`."""

import re

from jaxrlhf.environments import Observation

RULES = "I think of a whole number from 1 to 100. Guess it. Answer with one number, and I say whether mine is higher."


class GuessNumber:
    """The model guesses the number in the column `secret`. It gets 1, less a tenth for each wrong guess."""

    columns = ("secret",)

    def reset(self, row):
        self.secret, self.wrong = int(row["secret"]), 0
        return [{"role": "user", "content": RULES}]

    def step(self, messages, response):
        numbers = re.findall(r"\d+", response)
        guess = int(numbers[0][:9]) if numbers else None
        info = {"wrong_guesses": self.wrong}
        if guess == self.secret:
            return Observation(reward=max(0.1, 1 - 0.1 * self.wrong), done=True, info=info)
        self.wrong += 1
        if guess is None:
            text = "That is no number. Answer with one number."
        else:
            text = "Higher." if guess < self.secret else "Lower."
        return Observation([{"role": "user", "content": text}], info={"wrong_guesses": self.wrong})

    def truncated(self):
        return 0.0
