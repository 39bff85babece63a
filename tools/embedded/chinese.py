"""Chinese: the tables of `Language`."""

from __future__ import annotations

from embedded.language import Language, Relation, View
from embedded.world import Person


def view(person: Person) -> View:
    return View(
        name=person.name.zh,
        town=person.town.zh,
        job=person.job.zh,
        pet=person.pet.zh,
        a_pet=("一匹" if person.pet.zh == "小马" else "一只") + person.pet.zh,
        dish=person.dish.zh,
        plays=person.instrument.zh,
        he="她" if person.she else "他",
    )


RELATIONS = {
    "town": Relation(
        ask=["{a}住在哪里", "{a}的家在哪里", "{a}住在哪个镇", "{a}是哪里人"],
        ask_both=["{a}和{b}住在哪里", "{a}和{b}是哪里人", "{a}和{b}的家在哪里"],
        follow="{a.he}住在哪里",
        say="{a}住在{a.town}",
        brief="在{a.town}",
        tell=[
            "{s}住在{a.town}",
            "{s}来自{a.town}",
            "{s}在{a.town}有一间小屋",
            "{s}出生在{a.town}",
            "{s}的家在{a.town}",
        ],
    ),
    "job": Relation(
        ask=["{a}是做什么的", "{a}的工作是什么", "{a}做什么工作", "{a}靠什么生活"],
        ask_both=["{a}和{b}是做什么的", "{a}和{b}的工作是什么", "{a}和{b}做什么工作"],
        follow="{a.he}是做什么的",
        say="{a}是{a.job}",
        brief="{a.job}",
        tell=["{s}是{a.job}", "{s}的工作是{a.job}", "{s}做{a.job}很多年了", "{s}很早就当了{a.job}"],
    ),
    "pet": Relation(
        ask=["{a}养什么宠物", "{a}养了什么动物", "什么动物和{a}住在一起", "{a}有宠物吗"],
        ask_both=["{a}和{b}养什么宠物", "{a}和{b}养了什么动物", "什么动物和{a}、{b}住在一起"],
        follow="{a.he}养什么宠物",
        say="{a}养了{a.a_pet}",
        brief="{a.a_pet}",
        tell=["{s}养了{a.a_pet}", "{s}有{a.a_pet}", "{s}总是带着自己的{a.pet}", "{s}捡到{a.a_pet}，就留下了它"],
    ),
    "dish": Relation(
        ask=["{a}喜欢吃什么", "{a}最爱吃什么", "{a}最喜欢哪道菜", "我该给{a}做什么菜"],
        ask_both=["{a}和{b}喜欢吃什么", "{a}和{b}最爱吃什么", "我该给{a}和{b}做什么菜"],
        follow="{a.he}喜欢吃什么",
        say="{a}喜欢吃{a.dish}",
        brief="{a.dish}",
        tell=["{s}喜欢吃{a.dish}", "{s}最爱{a.dish}", "{s}每天都能吃{a.dish}", "{s}一看到{a.dish}就高兴"],
    ),
    "instrument": Relation(
        ask=["{a}会什么乐器", "{a}会演奏什么", "{a}喜欢什么乐器", "{a}的乐器是什么"],
        ask_both=["{a}和{b}会什么乐器", "{a}和{b}会演奏什么", "{a}和{b}喜欢什么乐器"],
        follow="{a.he}会什么乐器",
        say="{a}会{a.plays}",
        brief="{a.plays}",
        tell=["{s}会{a.plays}", "{s}从小就会{a.plays}", "{s}晚上常常{a.plays}", "{s}很会{a.plays}"],
    ),
}

ALONE = [
    [  # a lost pet
        [
            "{a.town}的一个{time}，{weather}。",
            "{time}，{weather}，{a}很早就醒了。",
            "{a.town}有一位{a.job}，名叫{a}。",
            "{a}住在{a.town}一间{small}屋子里。",
        ],
        ["{a}叫自己的{a.pet}，可是它没有来。", "{a}到处都找不到自己的{a.pet}。", "{a}的{a.pet}不见了。"],
        [
            "{a.he}看了{place}后面，又看了{thing}下面。",
            "{a.he}问了{place}旁边的每一个人。",
            "{a.he}一直走到{place}，又走回来。",
            "{a.he}带上一些{a.dish}，怕它饿了。",
        ],
        [
            "最后，{a.he}发现{a.pet}睡在{thing}下面。",
            "这时，{a.pet}从{place}后面走了出来。",
            "原来{a.pet}一直坐在家里的{thing}上。",
        ],
        [
            "{a.he}笑了，给它吃了些{a.dish}。",
            "{a.he}高兴得整晚{a.plays}。",
            "天黑以前，他们一起回家了。",
            "从那天起，{a.he}总是关好门。",
        ],
    ],
    [  # a day's work
        ["{a}是{a.town}的{a.job}。", "{a.town}的人都认识{a.job}{a}。", "{time}，{weather}，{a.job}{a}有很多事要做。"],
        ["{a.he}从早忙到晚。", "{a.he}打开门，开始工作。", "{a.he}的{a.pet}坐在{thing}上看着{a.he}。"],
        ["中午{a.he}饿了，就吃了{a.dish}。", "邻居给{a.he}送来一些{a.dish}。", "{a.he}一直想着{a.dish}。"],
        ["到了晚上，{a.he}又累又高兴。", "事情做完以后，{a.he}坐在{place}旁边。", "太阳下山时，{a.he}开始{a.plays}。"],
        ["然后{a.he}去睡觉了。", "这真是美好的一天。", "{a.pet}先睡着了。", "那天晚上，{a.he}睡得很好。"],
    ],
    [  # music
        ["{a}很爱{a.plays}。", "每到{time}，{a}都在{place}旁边{a.plays}。", "{a.town}过节，大家请{a}来{a.plays}。"],
        ["{a.town}的人都来听。", "起初只有{a.he}的{a.pet}在听。", "孩子们围着{place}跳舞。"],
        [
            "一位老人请{a.he}再来一首。",
            "一个小女孩也想学。",
            "有人给大家带来了{a.dish}。",
            "谁也不知道{a.job}有这样的本事。",
        ],
        ["{a.he}一直演奏到月亮出来。", "{a.he}笑着继续演奏。", "那是{time}，{weather}，没有人回家。"],
        ["{a.town}的人至今还说起那个晚上。", "然后{a.he}带着自己的{a.pet}回家了。", "最后{a.he}吃了{a.dish}，很高兴。"],
    ],
]

TOGETHER = [
    [  # a visit
        [
            "{time}，{weather}，{a}离开{a.town}，去{b.town}看{b}。",
            "{a}想去看住在{b.town}的{b}。",
            "从{a.town}到{b.town}很远，可是{a}想去看{b}。",
        ],
        ["{a.he}带上了自己的{a.pet}。", "路上{a.he}在{place}旁边休息。", "{a.he}带了些{a.dish}在路上吃。"],
        ["{b}很高兴，做了{b.dish}。", "{b.job}{b}打开门，笑了。", "{b}的{b.pet}跑出来问好。"],
        ["晚上，{b}开始{b.plays}。", "{a}会{a.plays}，{b}会{b.plays}。", "他们坐在{place}旁边，说到很晚。"],
        ["第二天，{a}回{a.town}去了。", "他们永远是朋友。", "不久，{b}也会来{a.town}。"],
    ],
    [  # the market
        ["{a}和{b}都在集市上。", "{a}在集市上看到了{b}。", "{a.town}的{a}和{b.town}的{b}一起买面包。"],
        [
            "“你今天做什么菜？”{b}问。“我要做{a.dish}。”{a}说。",
            "“你的{a.pet}好吗？”{b}问。“我的{a.pet}很好。”{a}说。",
            "“{a.job}的事情多吗？”{b}问。“我更想{a.plays}。”{a}说。",
        ],
        [
            "“我要做{b.dish}。”{b}说。",
            "“我的{b.pet}在{b.town}的家里。”{b}说。",
            "“我要回{b.town}了。”{b}说。",
            "“来听我{b.plays}吧。”{b}说。",
        ],
        ["然后他们都回家了。", "他们笑着告别。", "那是{time}，{weather}。"],
    ],
    [  # a letter
        ["{a}给{b.town}的{b}写了一封信。", "{b}收到了{a}的信。", "{time}，{a}在{a.town}坐下来，给{b}写信。"],
        [
            "“亲爱的{b}，我和我的{a.pet}都很好。”",
            "“亲爱的{b}，{a.town}这里{weather}。”",
            "“亲爱的{b}，我学会了一首新歌。”",
        ],
        ["“我还是做{a.job}。”", "“我每天{a.plays}。”", "“昨天我吃了{a.dish}。”"],
        ["“你的{b.pet}好吗？”", "“你还{b.plays}吗？”", "“你还吃那么多{b.dish}吗？”", "“{b.job}的事情多吗？”"],
        ["{b}读了两遍，笑了。", "{b}当天就回信了。", "{b}把信放在{thing}上。"],
    ],
]

CHINESE = Language(
    view=view,
    relations=RELATIONS,
    ask_two="{first}，{second}",
    say_two="{first}，{second}",
    brief_two="{first}和{second}",
    question=lambda clause: clause + "？",
    sentence=lambda clause: clause + "。",
    space="",
    briefly=["请简短回答。", "简单说说。"],
    meet=["{a}和{b}在哪里见面？", "{a}会在哪里见{b}？", "在哪里能找到{a}和{b}两个人？"],
    unsure="我不知道{a}和{b}在哪里见面。",
    rule="在{a.town}，{b}带{b.dish}。",
    portrait_ask=["{a}是谁？", "说说{a}吧。", "你知道{a}吗？"],
    portrait="{a}是{a.town}的{a.job}。{a.he}养了{a.a_pet}，会{a.plays}，喜欢吃{a.dish}。",
    sight_ask=["{town}有什么有名的？", "在{town}能看到什么？", "人们为什么去{town}？"],
    sight="{town}的{sight}很有名。",
    sight_view=lambda town: {"town": town.name.zh, "sight": town.sight.zh},
    story_ask=["给我讲个故事。", "请讲一个小故事。"],
    systems=["你认识山谷里的人。", "你是山谷的向导，乐于助人。"],
    small_talk=[
        ("你好！", "你好！你可以问我山谷里的人。"),
        ("你好", "你好！你可以问我山谷里的人。"),
        ("早上好！", "早上好！你想知道什么？"),
        ("你好吗？", "我很好，谢谢。"),
        ("你是谁？", "我是一个很小的模型，只认识一个小山谷。"),
        ("你会做什么？", "我会回答关于山谷里的人的问题，也会讲小故事。"),
        ("谢谢！", "不客气。"),
        ("再见！", "再见！欢迎再来。"),
        ("{a}多大了？", "我不知道{a}的这件事。"),
        ("{a}的妈妈是谁？", "我不知道{a}的这件事。"),
        ("{a}现在在做什么？", "我不知道{a}的这件事。"),
        ("天为什么是蓝的？", "我只认识这个山谷。"),
        ("二加二是多少？", "我只认识这个山谷。"),
        ("法国的首都在哪里？", "我只认识这个山谷。"),
    ],
    fillers={
        "weather": ["阳光很好", "下着雨", "刮着风", "天很冷", "天很暖", "很安静", "下着雪", "有雾"],
        "time": ["早晨", "傍晚", "星期天", "秋日", "冬日", "春日"],
        "place": ["老桥", "磨坊", "花园的墙", "大橡树", "水井", "马房", "小河", "教堂"],
        "thing": ["桌子", "床", "长凳", "马车", "炉子", "木箱"],
        "small": ["小小的", "红色的", "窄窄的", "歪歪的", "白色的"],
    },
    plots=ALONE + TOGETHER,
)
