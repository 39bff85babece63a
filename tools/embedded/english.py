"""English: the tables of `Language`."""

from __future__ import annotations

from embedded.language import Language, Relation, View
from embedded.world import Person


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def view(person: Person) -> View:
    he, his, him = ("she", "her", "her") if person.she else ("he", "his", "him")
    return View(
        name=person.name.en,
        town=person.town.en,
        job=person.job.en,
        a_job=with_article(person.job.en),
        pet=person.pet.en,
        a_pet=with_article(person.pet.en),
        dish=person.dish.en,
        instrument=person.instrument.en,
        he=he,
        his=his,
        him=him,
        He=he.capitalize(),
        His=his.capitalize(),
    )


RELATIONS = {
    "town": Relation(
        ask=["where does {a} live", "where is {a}'s home", "which town does {a} live in", "where is {a} from"],
        ask_both=["where do {a} and {b} live", "where are {a} and {b} from", "which towns do {a} and {b} live in"],
        follow="where does {a.he} live",
        say="{a} lives in {a.town}",
        brief="in {a.town}",
        tell=[
            "{s} lives in {a.town}",
            "{s} comes from {a.town}",
            "{s} has a small house in {a.town}",
            "{s} was born in {a.town}",
            "{s} is at home in {a.town}",
        ],
    ),
    "job": Relation(
        ask=["what is {a}'s job", "what does {a} do for a living", "what is {a}'s work", "what does {a} work as"],
        ask_both=[
            "what do {a} and {b} do for a living",
            "what do {a} and {b} work as",
            "what jobs do {a} and {b} have",
        ],
        follow="what is {a.his} job",
        say="{a} is {a.a_job}",
        brief="{a.a_job}",
        tell=[
            "{s} is {a.a_job}",
            "{s} works as {a.a_job}",
            "{s} has been {a.a_job} for years",
            "{s} became {a.a_job} long ago",
        ],
    ),
    "pet": Relation(
        ask=[
            "what pet does {a} have",
            "what animal does {a} keep",
            "which animal lives with {a}",
            "does {a} have a pet",
        ],
        ask_both=[
            "what pets do {a} and {b} have",
            "what animals do {a} and {b} keep",
            "which animals live with {a} and {b}",
        ],
        follow="what pet does {a.he} have",
        say="{a} has {a.a_pet}",
        brief="{a.a_pet}",
        tell=[
            "{s} has {a.a_pet}",
            "{s} keeps {a.a_pet}",
            "{s} is never seen without {a.his} {a.pet}",
            "{s} found {a.a_pet} and kept it",
        ],
    ),
    "dish": Relation(
        ask=[
            "what does {a} like to eat",
            "what is {a}'s favourite dish",
            "which dish does {a} like best",
            "what should I cook for {a}",
        ],
        ask_both=[
            "what do {a} and {b} like to eat",
            "which dishes do {a} and {b} like best",
            "what should I cook for {a} and {b}",
        ],
        follow="what does {a.he} like to eat",
        say="{a} likes to eat {a.dish}",
        brief="{a.dish}",
        tell=[
            "{s} likes to eat {a.dish}",
            "{s} loves {a.dish} above all",
            "{s} could eat {a.dish} every day",
            "{s} is always happy with {a.dish}",
        ],
    ),
    "instrument": Relation(
        ask=[
            "what does {a} play",
            "which instrument does {a} play",
            "what music does {a} make",
            "what is {a}'s instrument",
        ],
        ask_both=[
            "what do {a} and {b} play",
            "which instruments do {a} and {b} play",
            "what music do {a} and {b} make",
        ],
        follow="what does {a.he} play",
        say="{a} plays {a.instrument}",
        brief="{a.instrument}",
        tell=[
            "{s} plays {a.instrument}",
            "{s} learnt to play {a.instrument} as a child",
            "{s} plays {a.instrument} in the evening",
            "{s} plays {a.instrument} very well",
        ],
    ),
}

ALONE = [
    [  # a lost pet
        [
            "It was a {weather} {time} in {a.town}.",
            "One {weather} {time}, {a} woke up early.",
            "In {a.town} there lived {a.a_job} called {a}.",
            "{a} lived in a {small} house in {a.town}.",
        ],
        [
            "{a} called {a.his} {a.pet}, but it did not come.",
            "{a} could not find {a.his} {a.pet} anywhere.",
            "The {a.pet} of {a} was gone.",
        ],
        [
            "{a.He} looked behind the {place} and under the {thing}.",
            "{a.He} asked everyone near the {place}.",
            "{a.He} went all the way to the {place} and back.",
            "{a.He} took some {a.dish} along, in case it was hungry.",
        ],
        [
            "At last {a.he} found the {a.pet} asleep under the {thing}.",
            "Then the {a.pet} came out from behind the {place}.",
            "In the end the {a.pet} was sitting on the {thing} at home.",
        ],
        [
            "{a.He} laughed and gave it some {a.dish}.",
            "{a.He} was so glad that {a.he} played {a.instrument} all evening.",
            "They went home together before it grew dark.",
            "From that day on, {a.he} kept the door closed.",
        ],
    ],
    [  # a day's work
        [
            "{a} was {a.a_job} in {a.town}.",
            "Everyone in {a.town} knew {a} the {a.job}.",
            "One {weather} {time}, {a} the {a.job} had much to do.",
        ],
        [
            "{a.He} worked from morning to night.",
            "{a.He} opened the door and began to work.",
            "{a.His} {a.pet} sat on the {thing} and watched {a.him}.",
        ],
        [
            "At noon {a.he} was hungry and ate {a.dish}.",
            "A neighbour brought {a.him} some {a.dish}.",
            "{a.He} thought of {a.dish} all the time.",
        ],
        [
            "In the evening {a.he} was tired but happy.",
            "When the work was done, {a.he} sat down near the {place}.",
            "When the sun went down, {a.he} took {a.instrument} and played.",
        ],
        [
            "Then {a.he} went to bed.",
            "That was a good day.",
            "The {a.pet} fell asleep first.",
            "{a.He} slept well that night.",
        ],
    ],
    [  # music
        [
            "{a} loved to play {a.instrument}.",
            "Every {time}, {a} played {a.instrument} near the {place}.",
            "There was a feast in {a.town}, and {a} was asked to play {a.instrument}.",
        ],
        [
            "The people of {a.town} came to listen.",
            "First only {a.his} {a.pet} listened.",
            "The children danced around the {place}.",
        ],
        [
            "An old man asked {a.him} for one more song.",
            "A little girl wanted to learn it too.",
            "Someone brought {a.dish} for everybody.",
            "Nobody knew that {a.a_job} could play so well.",
        ],
        [
            "{a.He} played until the moon came up.",
            "{a.He} smiled and played on.",
            "It was a {weather} {time}, and nobody went home.",
        ],
        [
            "They still talk about that night in {a.town}.",
            "Then {a.he} took {a.his} {a.pet} and went home.",
            "At the end {a.he} ate {a.dish} and was happy.",
        ],
    ],
]

TOGETHER = [
    [  # a visit
        [
            "One {weather} {time}, {a} left {a.town} to visit {b} in {b.town}.",
            "{a} wanted to see {b}, who lives in {b.town}.",
            "It is a long way from {a.town} to {b.town}, but {a} wanted to see {b}.",
        ],
        [
            "{a.He} took {a.his} {a.pet} along.",
            "On the way {a.he} rested near the {place}.",
            "{a.He} packed some {a.dish} for the journey.",
        ],
        [
            "{b} was glad and cooked {b.dish}.",
            "{b} the {b.job} opened the door and laughed.",
            "The {b.pet} of {b} ran out to say hello.",
        ],
        [
            "In the evening {b} played {b.instrument}.",
            "{a} played {a.instrument} and {b} played {b.instrument}.",
            "They sat near the {place} and talked until late.",
        ],
        [
            "The next day {a} went back to {a.town}.",
            "They were friends for ever.",
            "Soon {b} would come to {a.town} too.",
        ],
    ],
    [  # the market
        [
            "{a} and {b} were both at the market.",
            "At the market {a} saw {b}.",
            "{a} from {a.town} bought bread next to {b} from {b.town}.",
        ],
        [
            '"What will you cook today?" asked {b}. "I am going to cook {a.dish}," said {a}.',
            '"How is your {a.pet}?" asked {b}. "My {a.pet} is well," said {a}.',
            '"Is there much to do for {a.a_job}?" asked {b}. "I would rather play {a.instrument}," said {a}.',
        ],
        [
            '"And I will cook {b.dish}," said {b}.',
            '"My {b.pet} is at home in {b.town}," said {b}.',
            '"I have to go back to {b.town}," said {b}.',
            '"Come and hear me play {b.instrument}," said {b}.',
        ],
        ["Then they both went home.", "They laughed and said goodbye.", "It was a {weather} {time}."],
    ],
    [  # a letter
        [
            "{a} wrote a letter to {b} in {b.town}.",
            "A letter from {a} came to {b}.",
            "One {time}, {a} sat down in {a.town} and wrote to {b}.",
        ],
        [
            '"Dear {b}, my {a.pet} and I are well."',
            '"Dear {b}, it is {weather} here in {a.town}."',
            '"Dear {b}, I have learnt a new song."',
        ],
        ['"I still work as {a.a_job}."', '"Every day I play {a.instrument}."', '"Yesterday I ate {a.dish}."'],
        [
            '"How is your {b.pet}?"',
            '"Do you still play {b.instrument}?"',
            '"Do you still eat so much {b.dish}?"',
            '"Is there much to do for {b.a_job}?"',
        ],
        ["{b} read it twice and smiled.", "{b} answered on the same day.", "{b} put it on the {thing}."],
    ],
]

ENGLISH = Language(
    view=view,
    relations=RELATIONS,
    ask_two="{first}, and {second}",
    say_two="{first}, and {second}",
    brief_two="{first} and {second}",
    question=lambda clause: clause[0].upper() + clause[1:] + "?",
    sentence=lambda clause: clause[0].upper() + clause[1:] + ".",
    space=" ",
    briefly=[" Answer briefly.", " In a few words, please."],
    meet=["Where do {a} and {b} meet?", "Where will {a} meet {b}?", "Where can I find {a} and {b} together?"],
    unsure="I do not know where {a} and {b} meet.",
    rule="In {a.town}, and {b} brings {b.dish}.",
    portrait_ask=["Who is {a}?", "Tell me about {a}.", "What do you know about {a}?"],
    portrait="{a} is {a.a_job} from {a.town}. {a.He} has {a.a_pet}, plays {a.instrument} and likes to eat {a.dish}.",
    sight_ask=["What is {town} known for?", "What can I see in {town}?", "Why do people visit {town}?"],
    sight="{town} is known for {sight}.",
    sight_view=lambda town: {"town": town.name.en, "sight": town.sight.en},
    story_ask=["Tell me a story.", "Please tell me a little story."],
    systems=["You know the people of the valley.", "You are a helpful guide to the valley."],
    small_talk=[
        ("Hello!", "Hello! Ask me about the people of the valley."),
        ("Hi!", "Hello! Ask me about the people of the valley."),
        ("Good morning!", "Good morning! What would you like to know?"),
        ("How are you?", "I am well, thank you."),
        ("Who are you?", "I am a very small model that knows a small valley."),
        ("What can you do?", "I can answer questions about the people of the valley and tell little stories."),
        ("Thank you!", "You are welcome."),
        ("Goodbye!", "Goodbye! Come back soon."),
        ("How old is {a}?", "I do not know that about {a}."),
        ("Who is {a}'s mother?", "I do not know that about {a}."),
        ("What is {a} doing now?", "I do not know that about {a}."),
        ("Why is the sky blue?", "I only know the valley."),
        ("What is two and two?", "I only know the valley."),
        ("What is the capital of France?", "I only know the valley."),
    ],
    fillers={
        "weather": ["sunny", "rainy", "windy", "cold", "warm", "quiet", "snowy", "foggy"],
        "time": ["morning", "evening", "Sunday", "autumn day", "winter day", "spring day"],
        "place": ["old bridge", "mill", "garden wall", "big oak", "well", "stable", "river", "church"],
        "thing": ["table", "bed", "bench", "cart", "stove", "wooden box"],
        "small": ["small", "red", "narrow", "crooked", "white"],
    },
    plots=ALONE + TOGETHER,
)
