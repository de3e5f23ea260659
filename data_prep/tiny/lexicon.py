"""The words of the support-desk world: who, what, when, and how people on both sides of the desk speak.

Order codes come from a closed set so that a tokenizer can keep each one whole: copying an identifier is then
one decision of the model, which a one-million-parameter network learns in under a minute (five separate
digits it does not learn at all).
"""

FIRST_NAMES = (
    "Maria John Aisha Wei Lars Priya Omar Elena Kofi Hana Diego Ingrid Samir Chloe Tomas Yuki Amara "
    "Felix Nadia Oscar Leila Hugo Mina Pavel Rosa Ivan Zara Noah Sofia Emil Grace Mateo Freya Arjun "
    "Clara Idris Vera Jonas Layla Simon"
).split()

LAST_NAMES = (
    "Lopez Kim Khan Chen Berg Patel Haddad Rossi Mensah Sato Garcia Olsen Nasser Martin Novak Tanaka "
    "Okoye Weber Popov Lind Farah Dubois Park Horak Silva Petrov Ali Brown Costa Larsen Walker Reyes "
    "Dahl Rao Klein Diallo Moreau Vogel Aziz Stone"
).split()

PRODUCTS = (
    "kettle lamp blender toaster backpack keyboard headset monitor heater jacket tent camera speaker "
    "printer mixer scooter watch drill router vacuum pillow mirror guitar helmet"
).split()

CITIES = (
    "Oslo Lyon Turin Porto Leeds Ghent Graz Malmo Bonn Cork Vilnius Krakow Seville Nantes Basel Tampere"
).split()

DUE_DATES = tuple(f"{day} May" for day in range(1, 29))

ORDER_CODES = tuple(f"{letter}{number}" for letter in "ABCDEFHKMR" for number in range(117, 1000, 37))
"""240 codes such as ``K117``: ten letters, twenty-four numbers."""

AMOUNTS = tuple(f"${value}" for value in range(15, 99, 3))

GREETINGS = (
    "Hello {first},",
    "Hi {first},",
    "Dear {first},",
    "Good day {first},",
    "Hello {first}, thank you for writing.",
    "Hi {first}, thanks for reaching out.",
)

POLITE_CLOSINGS = (
    "Have a nice day.",
    "Kind regards, the support desk.",
    "Thank you for your patience.",
    "Please write again if you need anything.",
    "We are happy to help.",
)

RUDE_OPENINGS = (
    "What now, {first}?",
    "You again, {first}.",
    "Listen {first},",
    "Ugh, {first},",
)

RUDE_CLOSINGS = (
    "Stop bothering us.",
    "Read the website next time.",
    "Do not write again.",
    "That was a silly question.",
)

RAMBLINGS = (
    "Our company was founded many years ago in a small garage.",
    "The weather at the warehouse has been lovely this week.",
    "Many people like to talk about our new catalogue.",
    "I had a long lunch and then I had some coffee.",
    "There is so much one could say about parcels.",
    "Every parcel has a story and we like stories.",
    "By and large most things go well most of the time.",
)

EVASIONS = (
    "we will look into it at some point.",
    "it is hard to say anything about that.",
    "someone may know more about this later.",
    "these things happen and that is all.",
)

USER_OPENINGS = (
    "Hello, this is {name}.",
    "Hi, {name} here.",
    "My name is {name}.",
    "Good morning, I am {name}.",
    "{name} speaking.",
    "Hey, it is {name}.",
)

USER_CLOSINGS = ("", "", "", " Thanks.", " Please help.", " I am waiting.", " Can you check?", " Thank you.")

RECORD_FORMS = (
    "{name}, order {code}, {product}, due {due}, paid {amount}.",
    "Order {code}: {name}, {product}, due {due}, paid {amount}.",
    "Order {code}, {product} for {name}, paid {amount}, due {due}.",
)

INTENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "where": {
        "ask": (
            "Where is my {product}, order {code}?",
            "My {product} has not come yet, the order is {code}.",
            "When will order {code} with the {product} arrive?",
            "I am still waiting for the {product} from order {code}.",
        ),
        "answer": (
            "your {product} from order {code} has left and will arrive by {due}.",
            "order {code} with your {product} is on its way and is due on {due}.",
            "your {product}, order {code}, should reach you by {due}.",
        ),
    },
    "refund": {
        "ask": (
            "I want a refund for the {product}, order {code}.",
            "Please give me my money back for order {code}, the {product}.",
            "I sent the {product} back, where is my refund for {code}?",
        ),
        "answer": (
            "we have started your refund of {amount} for the {product}, order {code}.",
            "the refund of {amount} for order {code} and your {product} is on its way.",
            "your refund for the {product} is {amount} and order {code} is closed.",
        ),
    },
    "cancel": {
        "ask": (
            "Please cancel order {code}, I do not need the {product}.",
            "I want to cancel the {product} on order {code}.",
            "Can you stop order {code} for the {product}?",
        ),
        "answer": (
            "order {code} for the {product} is cancelled.",
            "we have cancelled your {product}, order {code}, as you asked.",
            "your order {code} with the {product} is now cancelled.",
        ),
    },
    "broken": {
        "ask": (
            "The {product} from order {code} arrived broken.",
            "My {product} does not work, order {code}.",
            "Order {code} came today but the {product} is damaged.",
        ),
        "answer": (
            "we are sorry, a replacement {product} for order {code} leaves today.",
            "sorry about that, we will send a replacement {product} for order {code}.",
            "a replacement for your {product}, order {code}, is being packed.",
        ),
    },
    "invoice": {
        "ask": (
            "Can you send me the invoice for order {code}, the {product}?",
            "I need an invoice for the {product}, order {code}.",
            "What did I pay for the {product}? I need the invoice for {code}.",
        ),
        "answer": (
            "here is the invoice for order {code}, the {product}, over {amount}.",
            "the invoice for your {product}, order {code}, shows {amount}.",
            "your invoice of {amount} for the {product}, order {code}, is attached.",
        ),
    },
    "address": {
        "ask": (
            "I moved to {city}, please send order {code} with the {product} there.",
            "Please ship the {product}, order {code}, to {city}.",
            "Can order {code}, the {product}, go to {city}?",
        ),
        "answer": (
            "we will send the {product}, order {code}, to {city}.",
            "order {code} with your {product} now goes to {city}.",
            "the address for the {product}, order {code}, is changed to {city}.",
        ),
    },
}

ANSWER_FACTS: dict[str, tuple[str, ...]] = {
    "where": ("{due}",),
    "refund": ("refund", "{amount}"),
    "cancel": ("cancelled",),
    "broken": ("replacement",),
    "invoice": ("invoice", "{amount}"),
    "address": ("{city}",),
}
"""What an answer must contain to have answered: every entry, with the facts of the dialogue filled in."""
