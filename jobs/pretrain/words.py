"""Words that name nothing in the scenes: the tiny model must answer "absent" to them, also to those it never saw."""

from __future__ import annotations

import numpy as np

from sam3lora.data.synth.scenes import WORDS

KNOWN_ABSENT = """
account acid afternoon album ankle apron aunt avenue axe bacon badge bag bakery balcony banana band bank basin
basket bat bath battery beach bean bear beard bed bee belt bench bike bird biscuit blanket boat bomb bone book boot
bottle bowl box boy brain branch bread brick bridge broom brush bucket bug bus butter cabbage cabin cable cage cake
calf camel camera camp candle cane canoe cap carpet carrot castle cat cattle cave chain chair chalk cheese chess chest
chicken chimney church cigar city clam class clock cloud clown coach coal coast coat cobweb coin comb cookie cord corn
couch cow cradle crate crayon cream creek crib crow crown crowd cub cup curtain cushion deer desk diamond dinner dirt
dock doctor dog doll donkey drain drawer dress drink drum duck dust eagle ear earth egg elbow engine eye face fairy fan
farm feather feet fence field finger fire fish flag flame flesh floor fly fog food foot fork fox frame friend frog fuel
furniture garden gate ghost giant giraffe girl glass glove glue goat goose grandfather grape grass guitar gun hair
hammer hand harbor hat head heat hen hill hobby honey hook horn horse hose hospital hotel house ice ink insect iron
island jacket jail jam jar jelly jewel judge juice kettle key kick kiss kitten knee knife knot lace ladybug lake lamp
land laptop lawyer leather leg lemon letter library lion lip lizard lock lunch machine magic maid mailbox man map marble
mask meal meat milk mine mirror mist mitten monkey moon mother mountain mouth nail neck needle nest net night north nose
nurse oatmeal ocean office orchard oven owl page pail pan pancake paper park parrot party pear pen pencil person pet
picture pie pig pillow pin pipe pizza place plane plant plate plot pocket poison police popcorn porter pot potato powder
puppet quartz queen quilt quiver rabbit rail railway rain rake rat rice river road robin rod roof room root rope rose
route sack sail salt sand sea seat seed shade sheep sheet shelf ship shirt shoe shop silk sink sister skate skirt sky
slave sled smoke snail snake snow soap sock soda sofa soup spade spark spider sponge spoon spot spring stage stamp steam
stem stew stick stocking stomach store stove straw stream street string sugar suit sun sweater swing table tail tank
taxi teeth tent thread throat throne ticket tiger toad toe tomato tongue tooth town toy trail train tray tree truck
trousers tub turkey twig umbrella uncle van vase vegetable veil vest volcano voyage wagon wall water wave wax weather
wheel whip whistle wing winter wire wolf woman wood wool wren wrist yak yam yard zebra zipper zoo
""".split()
HELD_OUT_ABSENT = """
acorn airplane anchor antelope balloon barrel beaver bicycle blouse bracelet broccoli buffalo cactus calculator candy
cannon cherry cucumber curtains dolphin dragon elephant envelope eraser faucet ferry football fountain goldfish hamster
helicopter jeans kangaroo keyboard kite ladder lantern mailman motorcycle necklace notebook octopus onion oyster panda
peacock penguin piano pineapple pumpkin rocket sandwich scissors shampoo skeleton suitcase television toothbrush trumpet
turtle vacuum violin walrus whale window yogurt
""".split()


def absent_word(rng: np.random.Generator) -> str:
    """A word from the list, a made-up one, or one with a known attribute in front."""
    roll = rng.random()
    if roll < 0.65:
        word = KNOWN_ABSENT[rng.integers(len(KNOWN_ABSENT))]
    else:
        letters = rng.integers(0, 26, rng.integers(3, 10))
        word = "".join(chr(97 + letter) for letter in letters)
        if word.endswith(WORDS):
            word += "q"
    if rng.random() < 0.2:
        first = WORDS[rng.integers(11)]
        return f"{first} {word}"
    return word
