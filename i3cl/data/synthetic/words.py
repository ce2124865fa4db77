"""The words on synthetic signs."""

from __future__ import annotations

import numpy as np

_SIGN_TEXT = (
    "open closed exit entrance taxi hotel cafe bar bank sale stop parking station market bakery pharmacy fresh coffee "
    "books pizza welcome restaurant garden museum library studio express center street avenue road lane drive bridge "
    "park plaza mall tower house city town hall school church clinic dental optical beauty salon barber fashion shoes "
    "sports toys gifts flowers jewellery watches electronics mobile computer repair service rental travel tours ticket "
    "information reception customer staff only private no smoking entry waiting push pull mind the gap way out lift "
    "stairs toilets ladies gentlemen danger warning caution keep clear slow speed limit one way turn left right ahead "
    "fire hose assembly point emergency call free wifi menu lunch dinner breakfast burger chicken noodles rice tea juice "
    "ice cream beer wine organic natural quality original classic special offer new best price save buy get half "
    "deal discount gift card cash credit pay here next counter level floor ground basement block unit gate platform "
    "north south east west airport terminal bus stop train metro line central international national royal golden "
    "super star sun moon blue green red black white fine art photo music dance school of and for to in at by with from "
    "your our all day night monday friday sunday hours since established family home kitchen living design solutions "
    "rue avenue boulevard place gare sortie accueil boulangerie pharmacie tabac presse marché maison hôtel fermé "
    "ouvert école mairie chemin église du de la le les des et au aux sur pour interdit défense défilé crêperie "
    "straße ausgang bäckerei café señor plaza calle salida tienda panadería via piazza gelato trattoria ristorante"
)
_SIGNS = _SIGN_TEXT.split()
_SYLLABLES = (
    "b c d f g h j k l m n p r s t v w br ch cl dr fl gr pl pr sh sl st str th tr",
    "a e i o u ai ea ee io oo ou y",
    "l m n r s t ck nd ng rk st x",
)
_ONSETS, _NUCLEI, _CODAS = (part.split() for part in _SYLLABLES)
_CJK = (
    "中国大小人民店商场超市饭馆酒楼茶餐厅面包咖啡书报药房医院学校银行邮局车站地铁公交出口入口停车场电话手机维修"
    "服装鞋帽美容理发眼镜珠宝金银首饰家具装饰建材五金水果蔬菜海鲜烧烤火锅川湘粤味香辣鱼肉鸡鸭牛羊豆腐米粉饺子"
    "东南西北街路道巷号楼层门窗开关上下左右前后内外高低新旧老字好吃便宜优惠打折免费特价批发零售专卖连锁总部分公司"
    "有限责任集团科技发展文化艺术中心广告印刷设计培训教育英语少儿幼园安全生产禁止吸烟小心注意请勿入内办证年月日时"
)
_PLAIN_SIGNS = [
    "OPEN",
    "CLOSED",
    "EXIT",
    "ENTRY",
    "TAXI",
    "HOTEL",
    "CAFE",
    "BAR",
    "BANK",
    "SALE",
    "STOP",
    "PARKING",
    "STATION",
    "MARKET",
    "BAKERY",
    "PHARMACY",
    "FRESH",
    "Coffee",
    "Books",
    "Pizza",
    "Welcome",
    "Restaurant",
    "Garden",
    "Museum",
    "Library",
    "Studio",
    "Express",
    "Center",
    "Street",
    "Avenue",
    "24H",
    "No1",
    "1987",
    "50OFF",
    "Since1920",
]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def plain_word(rng: np.random.Generator) -> str:
    """3 to 10 letters or digits, for the plain generator."""
    kind = rng.random()
    if kind < 0.2:
        return str(rng.choice(_PLAIN_SIGNS))
    if kind < 0.3:
        return "".join(rng.choice(list("0123456789"), rng.integers(3, 7)))
    text = ""
    for _ in range(rng.integers(1, 5)):
        text += str(rng.choice(_ONSETS)) + str(rng.choice(_NUCLEI[:-1]))
        text += str(rng.choice(_CODAS[:-1])) if rng.random() < 0.75 else ""
    text = (text if len(text) >= 3 else text + "ns")[:10]
    return (text.lower(), text.upper(), text.capitalize())[rng.integers(3)]


def latin_word(rng: np.random.Generator) -> str:
    """A word of a sign, sometimes an invented one or a few random letters; in lower case except for random letters."""
    kind = rng.random()
    if kind < 0.7:
        return _SIGNS[rng.integers(len(_SIGNS))]
    if kind < 0.93:
        parts = []
        for _ in range(rng.integers(1, 4)):
            parts += [_ONSETS[rng.integers(len(_ONSETS))], _NUCLEI[rng.integers(len(_NUCLEI))]]
            if rng.random() < 0.6:
                parts.append(_CODAS[rng.integers(len(_CODAS))])
        return "".join(parts)
    return "".join(_LETTERS[i] for i in rng.integers(len(_LETTERS), size=rng.integers(1, 8)))


def digits_word(rng: np.random.Generator) -> str:
    """A number, price, year, time, telephone part, percentage or a code of letters and digits."""
    number = int(10 ** rng.uniform(0, 4))
    kind = rng.integers(8)
    if kind == 0:
        return f"{'$€£'[rng.integers(3)]}{number % 100}.{rng.integers(100):02d}"
    if kind == 1:
        return f"{rng.integers(24)}:{rng.integers(60):02d}"
    if kind == 2:
        return f"{rng.integers(1, 100)}%"
    if kind == 3:
        return f"{rng.integers(1900, 2030)}"
    if kind == 4:
        return f"{rng.integers(10**6, 10**8)}"
    if kind == 5:
        return f"{_LETTERS[rng.integers(26)]}{number}"
    return str(number)


def cjk_word(rng: np.random.Generator) -> str:
    """One to eight common Chinese characters."""
    return "".join(_CJK[i] for i in rng.integers(len(_CJK), size=rng.integers(1, 9)))


def line_of_words(rng: np.random.Generator, language: str, count: int) -> list[str]:
    """`count` words of one line in one case. language: 'latin', 'cjk' or 'digits'."""
    if language == "cjk":
        return [cjk_word(rng) for _ in range(min(count, 2))]
    if language == "digits":
        return [digits_word(rng) for _ in range(min(count, 3))]
    line = [digits_word(rng) if rng.random() < 0.06 else latin_word(rng) for _ in range(count)]
    case = rng.random()
    if case < 0.45:
        return [word.upper() for word in line]
    if case < 0.8:
        return [word[:1].upper() + word[1:] for word in line]
    return line
