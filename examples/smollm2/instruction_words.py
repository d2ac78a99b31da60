"""Topics, tasks and words of which `instruction_prompts.py` makes prompts."""


def parts(text: str, separator: str | None = None) -> list[str]:
    """The parts of a text between separators, or its words, without line breaks."""
    return [part.strip() for part in text.replace("\n", " ").split(separator)]


TOPICS = parts(
    """
growing tomatoes on a balcony; learning to play the violin; a lost umbrella; the first day at a new job; making
bread at home; a stormy night at sea; keeping bees; moving to a small town; planning a birthday party; a broken
washing machine; the history of bicycles; walking in the forest; a lonely lighthouse; repairing old furniture;
teaching a dog to sit; a trip through the desert; writing a diary; how rainbows form; living without a car; a school
play; the life of penguins; learning a new language; an old train station; saving water at home; a chess tournament;
painting a kitchen; a rainy weekend; cooking for one person; the night sky; adopting a cat; a village market;
swimming in cold water; the invention of paper; a noisy neighbour; packing for a long journey; a garden in winter;
riding a horse; a forgotten password; public libraries; making friends as an adult; a robot that paints; baking an
apple pie; volcanoes; working from home; a bus that is always late; collecting stamps; a mountain cabin; healthy
breakfasts; a visit to the dentist; running a first race; the ocean at night; learning to drive; a secret recipe;
building a tree house; morning routines; a lost suitcase; city parks; an honest mistake; watching birds; the moon
landing; knitting a scarf; a long phone call; sleeping better; a surprising letter; summer camps; street musicians;
growing up on a farm; a flooded cellar; electric buses; a good teacher; camping with children; a mysterious key;
public speaking; the taste of coffee; a broken promise; making soap; visiting a museum; a snowman that melts;
recycling glass; a family dinner; the sound of rain; starting a book club; an empty theatre; fixing a flat tyre; how
bridges are built; a talking parrot; learning to cook rice; a late flight; spring cleaning; a hidden waterfall;
taking photographs; a first apartment; dancing the tango; the colours of autumn; an online course; a grumpy baker;
wild mushrooms; writing thank-you notes; a trip by night train; solar panels; a curious fox; planting trees; playing
the drums; a missing painting; city traffic; the smell of old books; a picnic by the river; brave firefighters;
learning to sew; a wooden boat; mental arithmetic; an unexpected guest; sharing a kitchen; the desert fox; buying a
used car; a snow day; quiet mornings; homemade ice cream; a school garden; moving house with pets; deep breathing;
ancient maps; a job in a bakery; the last day of summer; growing herbs; a musical family; stray cats; a ride in a
balloon; the northern lights; a weekend without screens; making a budget; a clumsy wizard; riding the bus; a village
doctor; the game of football; paper planes; an early train; keeping a promise; glass blowing; a noisy classroom;
long winters; a walk with grandfather; making cheese; lost keys; the first snow; a cheap holiday; honey and tea;
learning to ski; an old photograph; a night in a museum; the price of bread; a friendly ghost; growing old; island
life; a broken clock; doing the laundry; a boat race; gardening with children; the art of listening; tide pools; a
quiet village; a jar of jam
""",
    ";",
)
EVAL_TOPICS = parts(
    """
raising chickens; a letter from the future; learning to juggle; the life of turtles; a power cut; making candles;
the history of chocolate; a shy dragon; cycling to work; an orchestra rehearsal; growing potatoes; a wrong number;
desert plants; hosting a guest from abroad; a cracked phone screen; the smell of the sea; folding paper cranes; a
slow computer; city rooftops; ice fishing; a stubborn donkey; choosing a mattress; the invention of glasses; a
fishing village; learning to whistle; a surprise party; the job of a librarian; sleeping in a tent; a stolen
sandwich; frozen lakes; a friendly rival; washing a woollen jumper; the life of ants; an empty fridge; lighthouse
keepers; a garage sale; making lemonade; how clocks work; a long queue; a talent show
""",
    ";",
)
TASKS = """
Write a short poem about {topic}.
Write a poem for a child about {topic}.
Write a story about {topic}.
Tell me a short story with the subject: {topic}.
Write an email to a friend about {topic}.
Write a polite email to my neighbours about {topic}.
Write a letter to my aunt about {topic}.
Explain to a beginner what matters most about {topic}.
Give a brief introduction to the subject of {topic}.
Make a list of tips on {topic}.
List the good and the bad sides of {topic}.
Write a review of a book about {topic}.
Write a review of a documentary about {topic}.
Write a blog post about {topic}.
Write a diary entry about {topic}.
Write a speech about {topic} for a small audience.
Write a dialogue between two friends about {topic}.
Write an advertisement for a class on {topic}.
Write a news report about {topic}.
Write a song about {topic}.
Write a riddle about {topic}.
Describe {topic} to someone who knows nothing about it.
Give me ideas for a painting about {topic}.
Write an essay about {topic}.
Summarise what people like about {topic}.
Write an invitation to an evening about {topic}.
Write a joke about {topic}.
Write a short scene of a film about {topic}.
Write a social media post about {topic}.
Plan a lesson about {topic} for a school class.
Write the opening paragraph of a novel about {topic}.
Write a product description for a game about {topic}.
What would you say about {topic} in a short interview?
Compare {topic} with something similar.
""".strip().splitlines()
QUESTIONS = """
Is {topic} a good subject for a film?
Would you read a book about {topic}?
Could a child learn something from {topic}?
Is {topic} worth talking about?
Do most people have an opinion on {topic}?
Has {topic} become more popular lately?
""".strip().splitlines()
WORDS = parts("""
simple quiet bright together careful village window summer patient journey friend garden story music winter morning
river honest curious gentle learn travel family water colour dream light road heart smile teacher paper kitchen
promise weather letter wonder market bread season silver harvest mountain lantern neighbour basket holiday candle
whisper forest kindness tradition laughter adventure courage
""")
COMMON = parts("very good great important make also many new people time day different always best really often")
ENDINGS = parts(
    """
That is all for now. | Thank you for reading! | What do you think? | See you soon. | And that made all the
difference. | Have a wonderful day! | I hope this helps. | Let me know how it goes. | The end. | Can I do anything
else for you? | Stay curious! | Now it is your turn.
""",
    "|",
)
FIRST_WORDS = parts("today once sometimes imagine everyone yesterday perhaps finally nobody here")
