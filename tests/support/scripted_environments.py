"""Environments for tests: a partner that counts turns, and one that misbehaves as its row says."""

import asyncio
import dataclasses
import threading

from jaxrlhf.environments import Observation


class Counting:
    """Three turns with the rewards 0.5, nothing and 2, with longer messages after each."""

    async def reset(self, row):
        self.turn = 0
        await asyncio.sleep(0)

    async def step(self, messages, response):
        self.turn += 1
        assert len(messages) == 2 * self.turn - 1 and messages[-1]["role"] == "user"
        again = [{"role": "user", "content": " ".join(["again"] * self.turn)}]
        rewards = {1: 0.5, 2: None, 3: 2.0}
        return Observation(again, rewards[self.turn], self.turn == 3, {"turn": self.turn, "text": response})


class Varied(Counting):
    """The same, with a reward for the letters of the last turn."""

    async def step(self, messages, response):
        observation = await super().step(messages, response)
        letters = sum(character.isalpha() for character in response)
        return dataclasses.replace(observation, reward=(observation.reward or 0) + letters / 10)


class Scripted:
    """Does in its second turn what the column `behaviour` says; "truncates" gets a reward when a limit ends it."""

    columns = ("behaviour",)

    def reset(self, row):
        self.turn, self.behaviour = 0, row["behaviour"]
        if self.behaviour == "begins badly":
            return ["hello"]
        if self.behaviour == "begins long":
            return [{"role": "user", "content": "long " * 100}]
        return [{"role": "user", "content": f"This is {self.behaviour}."}]

    def step(self, messages, response):
        self.turn += 1
        go_on = Observation([{"role": "user", "content": "go on"}])
        if self.turn == 1 or self.behaviour == "truncates":
            return go_on
        if self.behaviour == "raises":
            raise KeyError("no such thing")
        if self.behaviour == "hangs":
            threading.Event().wait(60)
        if self.behaviour == "loops":
            while True:
                pass
        if self.behaviour == "talks too much":
            return Observation([{"role": "user", "content": "blah " * 200}], 0.25)
        answers = {
            "wrong type": ("go on", 1.0, False),
            "wrong message": Observation([{"role": "user"}]),
            "wrong reward": Observation(reward=float("nan"), done=True),
            "says nothing": Observation(),
            "silent": Observation(done=True),
            "good": Observation(reward=1.0, done=True),
        }
        return answers[self.behaviour]

    def truncated(self):
        return -1.0 if self.behaviour == "truncates" else None
