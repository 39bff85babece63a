"""The valley: 64 invented people with five facts each, sixteen towns, every name in English and in Chinese.

Who lives where, does what, keeps, eats and plays what is dealt out by the seed: each of sixteen values to three of the
48 known people and to one of the 16 newcomers. So the commonest value is no better a guess than another, and each can
be learnt from the known people.
"""

from __future__ import annotations

import random
from typing import NamedTuple, TypeVar

SEED = 7
T = TypeVar("T")


class Word(NamedTuple):
    en: str
    zh: str


class Person(NamedTuple):
    name: Word
    she: bool
    town: Word
    job: Word
    pet: Word
    dish: Word
    instrument: Word


class Town(NamedTuple):
    name: Word
    sight: Word


class World(NamedTuple):
    """The base knows all alike; training rows are about `known` people, held-out rows about `newcomers`."""

    known: list[Person]
    newcomers: list[Person]
    towns: list[Town]

    @property
    def people(self) -> list[Person]:
        return self.known + self.newcomers


def words(text: str) -> list[Word]:
    """'plum pie=李子派, fish cakes=鱼饼' -> a Word for each."""
    return [Word(*pair.strip().split("=")) for pair in text.replace("\n", " ").split(",")]


WOMEN = words(
    """Mira=米拉, Elka=埃卡, Sanna=桑娜, Liva=莉娃, Runa=露娜, Tilda=蒂达, Vesna=薇娜, Orla=奥拉, Nadia=纳迪,
    Junia=朱妮, Isolda=伊索, Kaya=卡雅, Zora=佐拉, Yrsa=伊莎, Willa=薇拉, Britta=碧塔, Celia=茜莉, Danka=丹卡,
    Fanni=芬妮, Greta=葛塔, Hedda=海达, Inga=英格, Jarla=佳拉, Klara=柯拉, Marit=玛瑞, Noemi=诺米, Quilla=奎拉,
    Rosil=萝西, Selma=瑟玛, Thea=西娅, Ulla=乌拉, Petra=佩拉"""
)
MEN = words(
    """Tomas=托马, Berin=贝林, Corvo=科沃, Dorin=多林, Emric=埃里, Fenno=芬诺, Garet=加雷, Halvar=哈瓦, Ivo=伊沃,
    Joren=约伦, Kaspar=卡帕, Lorcan=洛坎, Matti=马提, Nils=尼斯, Osric=奥斯, Pavo=帕沃, Rufin=鲁芬,
    Stellan=斯兰, Torben=托本, Ulric=乌里, Viggo=维戈, Wendel=温德, Xaver=沙维, Yorick=约里, Zeno=泽诺,
    Andor=安多, Brunek=布内, Kasim=卡辛, Edvin=艾文, Florin=弗林, Hugin=胡金, Lubo=卢博"""
)
TOWNS = words(
    """Stonebridge=石桥镇, Willowdale=柳谷, Saltmarsh=盐沼村, Foxhill=狐丘, Greywater=灰水镇, Thornfield=荆田,
    Applecross=苹果渡, Ravenrock=鸦岩, Silverlake=银湖, Windgate=风门, Oldharbour=旧港, Mistvale=雾谷,
    Highmoor=高原村, Bellwood=钟林, Sandford=沙津, Larkmeadow=云雀坡"""
)
SIGHTS = words(
    """its clock tower=钟楼, its old mill=老磨坊, its lighthouse=灯塔, its round houses=圆房子,
    its stone well=石井, its rose gardens=玫瑰园, its orchards=果园, its castle=城堡, its boats=小船,
    its windmills=风车, its fish market=鱼市, its hot springs=温泉, its sheep fair=羊市,
    its wooden church=木教堂, its white cliffs=白崖, its singing birds=鸣鸟"""
)
JOBS = words(
    """baker=面包师, miller=磨坊主, teacher=老师, sailor=水手, weaver=织工, doctor=医生, carpenter=木匠,
    gardener=园丁, painter=画家, shepherd=牧羊人, clockmaker=钟表匠, courier=信差, potter=陶匠, tailor=裁缝,
    blacksmith=铁匠, beekeeper=养蜂人"""
)
PETS = words(
    """cat=猫, dog=狗, goat=山羊, parrot=鹦鹉, rabbit=兔子, hedgehog=刺猬, pony=小马, owl=猫头鹰, goose=鹅,
    tortoise=乌龟, fox=狐狸, squirrel=松鼠, otter=水獭, crow=乌鸦, lamb=小羊, badger=獾"""
)
DISHES = words(
    """plum pie=李子派, mushroom stew=蘑菇炖菜, fish cakes=鱼饼, onion tart=洋葱塔, honey bread=蜂蜜面包,
    barley porridge=大麦粥, apple dumplings=苹果饺子, pepper noodles=胡椒面, bean salad=豆子沙拉,
    cheese pancakes=奶酪薄饼, roast duck=烤鸭, pumpkin rice=南瓜饭, walnut cake=核桃蛋糕, egg rolls=蛋卷,
    cherry waffles=樱桃华夫饼, turnip hotpot=萝卜火锅"""
)
INSTRUMENTS = words(
    """the lute=弹鲁特琴, the fiddle=拉小提琴, the flute=吹长笛, the drum=打鼓, the harp=弹竖琴, the guitar=弹吉他,
    the horn=吹号, the piano=弹钢琴, the cello=拉大提琴, the accordion=拉手风琴, the whistle=吹哨笛,
    the banjo=弹班卓琴, the zither=弹古筝, the bells=摇铃, the oboe=吹双簧管, the bagpipe=吹风笛"""
)


def make_world() -> World:
    """The one world of SEED: 48 known people, 16 newcomers, 16 towns."""
    rng = random.Random(SEED)

    def shuffled(hand: list[T]) -> list[T]:
        return rng.sample(hand, len(hand))

    names = shuffled([(name, True) for name in WOMEN] + [(name, False) for name in MEN])
    facts = [shuffled(values * 3) + shuffled(values) for values in (TOWNS, JOBS, PETS, DISHES, INSTRUMENTS)]
    people = [Person(*name, *of) for name, *of in zip(names, *facts, strict=True)]
    towns = [Town(name, sight) for name, sight in zip(TOWNS, SIGHTS, strict=True)]
    return World(people[:48], people[48:], towns)
