"""Write a small Korean relation-extraction data set in the format of the KLUE-RE competition.

    python sample/make_sample.py

writes, next to this file, train.csv (about 1,500 rows) and test_data.csv (300 rows), with the
columns id,sentence,subject_entity,object_entity,label,source.  All 30 labels occur in both files.
Every sentence comes from a template below, filled from word lists: none is taken from KLUE-RE,
and the people, companies and facts are invented.  The same bytes come out on every run.

Template syntax: {S.co:은/는} draws a word from the pool `co`, remembers it as S and appends the
right particle; {S:은/는} appends only the particle that fits S (after a closing quote, say); a
slot without a name, {.city}, is a bystander.  People of one family share a digit and so a
surname: {S.m1}, {O.f1}.
"""
import csv
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import particle  # noqa: E402  (the repository root has just been put on the path)

SEED = 20210927
TEST_ROWS = 300
SOURCES, SOURCE_WEIGHTS = ("wikipedia", "wikitree", "policy_briefing"), (66, 33, 1)
TRAIN_COUNTS = {label: int(count) for count, labels in (line.split(maxsplit=1) for line in """
435 no_relation
95 org:top_members/employees
80 per:employee_of
65 per:title
50 org:member_of org:alternate_names
42 per:origin org:place_of_headquarters per:date_of_birth
34 per:alternate_names per:spouse per:children per:parents per:colleagues per:date_of_death org:founded org:members org:product
25 per:product per:place_of_residence per:other_family per:siblings per:schools_attended per:place_of_birth per:place_of_death
25 per:religion org:number_of_employees/members org:political/religious_affiliation org:dissolved org:founded_by
""".strip().splitlines()) for label in labels.split()}

# ---- Words.  Those that a particle follows end in a Hangul syllable, so it is never in doubt.
SURNAMES = "김 이 박 최 정 강 조 윤 장 임 한 오 서 신 권 황 안 송 류 홍 문 배 백 허 남 노 하 곽 성 차".split()
GIVEN = {
    "m": "민준 도균 재완 성호 태영 영수 상철 기탁 동제 병우 준서 우진 건우 종언 창민 현석 승규 진태 경수 형모".split(),
    "f": "서연 은정 미경 수진 혜란 영채 솔희 하은 예담 다온 채온 정임 순례 명선 보경 가영 유진 선영 현주 효정".split()}
FOREIGN_GIVEN = "마르셀 토머스 안드레이 헨리크 카를로 오스카 엘레나 소피 카밀라 잉그리드 이리나 베아트리스".split()
FOREIGN_SURNAMES = "베르나르 하우저 노박 페레이라 린드홀름 콘티 매켄지 오코너 바렐라 그린필드".split()
AGENCIES = [entry.split("/") for entry in (
    "해양안전진흥원/해진원/KMSI 국가기록연구원/국기연/NRRI 청년농업진흥원/청농원/YAPA "
    "산림생태연구원/산생연/FERI 한국전통공예협회/전공협/KTCA 지역물류개발원/물류원/RLDI "
    "고령사회정책연구원/고사연/ASPI 전국버섯생산자연합회/버섯연/NMGF 어린이교통안전재단/어통재/CTSF").split()]
STEMS = "가람누리 해온 벼리 미르온 새솔 은가람 하늬 도담 온새미 늘솔 아라뫼 초롬 바른샘 두빛 NVL JQ".split()
KINDS = "전자 건설 제약 화학 식품 소프트 중공업 물산 에너지 해운 증권 통신 항공 바이오".split()
TOWNS = "서울 부산 대구 인천 광주 대전 전주 강릉 목포 춘천 원주 청주 포항 여수 제주 안동 경주 군산 속초 통영".split()
CITIES = TOWNS + "런던 파리 도쿄 뉴욕 베를린 상하이 시드니 토론토 프라하 밴쿠버".split()
UNIVERSITIES = "한슬대학교 동연대학교 해람대학교 남해예술대학교 세인트모어대학교 청운산업대학교 백하대학교".split()
HIGH_SCHOOLS = "청하고등학교 은월고등학교 남도공업고등학교 새벽고등학교 달뫼고등학교 한내과학고등학교".split()
POOLS = {  # pool: (entity type, words)
    "co": ("ORG", [stem + kind for stem in STEMS for kind in KINDS]),
    "group": ("ORG", [stem + "그룹" for stem in STEMS]),
    "party": ("ORG", "새길당 화합국민당 푸른내일당 민생도약당 시민행동당 번영연합당 대한자강당 노농복지당".split()),
    "univ": ("ORG", UNIVERSITIES), "high": ("ORG", HIGH_SCHOOLS),
    "school": ("ORG", UNIVERSITIES + HIGH_SCHOOLS),
    "team": ("ORG", "레드폭스 스톰버즈 블랙이글즈 씨드래곤즈 그린호크스 노던베어스 화이트웨일즈 선더볼츠".split()),
    "league": ("ORG", "코리아윈터리그 동해안배구연맹 한강프로리그 아시아클럽리그 남부실업연맹".split()),
    "band": ("ORG", "새벽기차 실버애로 무지개정거장 네온로즈 스타폴 일곱밤 달빛상회 오렌지피버".split()),
    "union": ("ORG", "아시아해운동맹 세계청년과학연합 동북아항만협의회 국제습지보전기구 한국녹색기술협회 "
                     "환태평양어업기구 유라시아철도연맹 중소제조업협의회".split()),
    "church": ("ORG", "은혜누리교회 솔빛교회 한밭언덕교회 새문들교회 느티나무교회 바닷길교회".split()),
    "order": ("ORG", "대한새빛장로회 한국은총감리회 동방성결회 조선복음연맹 대한언약침례회".split()),
    "creed": ("POH", "사회민주주의 자유주의 보수주의 진보주의 민족주의 생태주의 농본주의 공화주의".split()),
    "faith": ("POH", "불교 천주교 개신교 원불교 이슬람교 힌두교 유대교 성공회 대종교 천도교".split()),
    "job": ("POH", "배우 가수 소설가 시인 화가 작곡가 건축가 물리학자 성악가 변호사 사진작가 번역가 영화감독 도예가".split()),
    "post": ("POH", "회장 부회장 대표 사무국장 홍보실장 단장 고문 본부장 대변인 감사".split()),
    "item": ("POH", "루미엘 클리나 바로미 스카이로 도담이 미르엔 나르미 해맑음".split()),
    "app": ("POH", "바로페이 넥스트그램 책방톡 나눔지도 하루일기장 모두의버스 동네서랍".split()),
    "work": ("POH", ["남쪽 창가의 편지", "푸른 계단 아래서", "바람이 쉬어 간 자리", "일곱 번째 등대", "먼지의 계절",
                     "겨울 항구의 밤", "빈집의 노래", "종이배를 띄우며", "새벽 네 시의 라디오", "해바라기 정거장"]),
    "pen": ("POH", "청계 백운당 송암 매죽헌 소호 남곡 월담 석천 우정 학산".split()),
    "stage": ("PER", "루나벨 제이린 하루카제 비비안나 도로시문 미스터윤 새벽달 나비소녀".split()),
    "town": ("LOC", TOWNS), "city": ("LOC", CITIES),
    "place": ("LOC", CITIES + ["경상남도 거창군", "전라남도 강진군", "강원도 평창군", "충청북도 옥천군", "경기도 이천시",
                               "서울 마포구", "부산 영도구", "미국 시애틀", "프랑스 리옹", "독일 함부르크"]),
    "nation": ("LOC", "일본 미국 프랑스 캐나다 독일 중국 베트남 브라질 러시아 스페인 호주 영국".split()),
    "num": ("NOH", [f"{n:,}명" for n in range(130, 9000, 170)] + [f"{n}여 명" for n in range(50, 900, 50)]
                   + [f"{n}만 {m},000명" for n in (1, 2, 3) for m in (2, 4, 5, 8)]),
}
POOLS["org"] = ("ORG", [word for pool in ("party", "team", "union") for word in POOLS[pool][1] * 4]
                + POOLS["co"][1])
YEARS = {"old": (1915, 1945), "mid": (1958, 1985), "new": (1992, 2018)}  # pools of dates
PEOPLE = "pkxmf"  # pools of people: anyone, Korean, foreign, Korean man, Korean woman

# ---- Templates.  "ab=label" says which relation holds from slot a to slot b, a bare "ad" that none
# does: one sentence serves a relation and its near miss.  A line without :: goes on as the one above.
SLOT = re.compile(r"\{(\w?)(?:\.([a-z]+)(\d?))?(?::([^}]+))?\}")  # name, pool, family, particle
TEMPLATES = """
SO=org:top_members/employees :: {S.org} {.post} {O.p:은/는} {.new} 열린 기자 간담회에서 앞으로의 계획을 밝혔다.
{O.p} {S.co} 대표이사는 "올해 안에 {.city} 공장을 완공하겠다"고 말했다.
{S.co:은/는} 신임 사장으로 {O.p} 전 {.co} 부사장을 선임했다고 밝혔다.
{S.party:은/는} {.new} 전당대회를 열어 {O.k:을/를} 새 대표로 선출했다.
{.town}에서 열린 개막식에는 {S.co} {O.p} 사장과 {.k} 시의원이 나란히 참석했다.
{S.team}의 {O.p} 감독은 {.team:과/와}의 경기를 앞두고 선발 명단을 공개했다.
SO=per:employee_of :: {S.p:은/는} {.new}부터 {O.co}에서 연구원으로 일하고 있다.
{.univ:을/를} 졸업한 {S.p:은/는} 곧바로 {O.co}에 입사해 {.city} 지사에서 근무했다.
{S.k} {O.agency} 선임연구위원은 토론회에서 "예산을 더 늘려야 한다"고 지적했다.
투수 {S.m:은/는} {.new} {.team:을/를} 떠나 {O.team:으로/로} 이적했고 등번호 27번을 받았다.
걸그룹 {O.band}의 보컬 {S.f:이/가} 새 주말 드라마의 주제가를 불렀다.
{O.party} {S.k} 의원은 {.late} {.town:을/를} 찾아 수해 현장을 둘러보았다.
SO=per:title :: {S.k:은/는} 대한민국의 {O.job:으로/로}, {.new}부터 {.city}에서 활동하고 있다.
{O.job} {S.p:이/가} {.late} {.city}에서 열린 시상식에서 공로상을 받았다.
{S.p} {.co} {O.post:은/는} 취임 1주년을 맞아 직원들에게 편지를 보냈다.
{.co}에 입사한 {S.k:은/는} 20년 만에 {O.post} 자리에 올랐다.
{.nation}의 {O.job} {S.x:은/는} 첫 내한 일정을 마치고 {.city:으로/로} 떠났다.
SO=org:members :: {O.co:과/와} {.co:은/는} {.mid} {S.union}의 창립 회원사로 이름을 올렸다.
{S.union:은/는} {.new} 총회에서 {O.agency}의 가입을 만장일치로 승인했다.
{O.nation:이/가} {.new} {S.union}의 열두 번째 회원국이 되었다.
{S.group:은/는} 주력 계열사인 {O.co}의 지분을 {.late} 추가로 사들였다.
SO=org:member_of :: {S.team:은/는} {O.league}에 소속된 프로 구단으로, {.town}에서 홈경기를 치른다.
{S.co:은/는} {.new} {O.union}의 정회원 자격을 얻었다.
{O.group}의 계열사인 {S.co:은/는} {.late} {.city}에 물류 창고를 지었다.
{S.agency:은/는} {.union}의 초청을 거절하고 {O.union}에 가입했다.
SO=org:alternate_names :: {S.agency}(약칭 {O.abbr}){S:은/는} {.late} {.city}에서 정기 세미나를 개최했다.
{S.co:은/는} {.new} 상호를 {O.co:으로/로} 바꾸고 새 로고를 공개했다.
흔히 '{O.abbr}'{O:이라/라}고 줄여 부르는 {S.agency:은/는} {.k} 대표가 이끌고 있다.
{S.party:은/는} {.new} 당명을 {O.party:으로/로} 변경하고 새 당사를 마련했다.
{S.agency}({O.latin}){S:이/가} {.late} 발표한 보고서에 따르면 이용자가 크게 늘었다.
{O.school:이/가} 옛 이름인 {S.school:은/는} {.city}에서 가장 오래된 학교이다.
SO=org:place_of_headquarters :: {O.place}에 본사를 둔 {S.co:이/가} 내년까지 {.city}에 새 공장을 짓는다.
{S.agency:은/는} {.new} 본부를 {.town}에서 {O.town:으로/로} 이전했다.
{S.school:은/는} {O.place}에 있는 사립 학교로, {.k:이/가} 이사장을 맡고 있다.
{O.place} 소재 기업인 {S.co:은/는} {.new} 코스닥 시장에 상장됐다.
SO=org:product :: {S.co:은/는} {.new} 신제품 '{O.item}'{O:을/를} 국내 시장에 출시했다.
{S.band:은/는} {.new} 두 번째 정규 앨범 《{O.work}》{O:을/를} 발매했다.
{S.co:이/가} 서비스하는 '{O.app}'{O:은/는} 한 달 만에 이용자 50만 명을 넘어섰다.
밴드 {S.band}의 노래 '{O.work}'{O:은/는} 드라마에 쓰이면서 뒤늦게 화제가 됐다.
SO=org:number_of_employees/members :: {S.co}의 임직원 수는 {.new} 기준으로 {O.num}에 달한다.
회원 {O.num:으로/로} 출발한 {S.union:은/는} {.new} 사단 법인이 되었다.
{S.party:은/는} 창당 한 달 만에 당원 {O.num:을/를} 모았다고 밝혔다.
교직원 {O.num:이/가} 근무하는 {S.univ:은/는} {.late} {.city}에 새 캠퍼스를 열었다.
SO=org:founded :: {O.mid}에 창립된 {S.union:은/는} {.new} 사무국을 {.city:으로/로} 옮겼다.
{.k:이/가} 초대 교장을 지낸 {S.high:은/는} {O.old} 문을 열었다.
{S.band:은/는} {O.new} 결성된 4인조 밴드로, 대표곡은 '{.work}'이다.
{S.party:은/는} {O.new} {.k:을/를} 초대 대표로 하여 창당되었다.
SO=org:dissolved :: {.mid} 결성된 {S.band:은/는} 멤버 간의 불화로 {O.new} 해체되었다.
{O.new} 해산한 {S.party:은/는} 한때 20석을 가진 원내 정당이었다.
{S.school:은/는} 학생 수가 해마다 줄어들면서 {O.new} 문을 닫았다.
{.town:을/를} 연고로 하던 {S.team:은/는} 모기업의 지원이 끊겨 {O.mid} 해단했다.
SO=org:founded_by :: {O.k:은/는} {.mid} 고향 {.city:으로/로} 돌아와 {S.school:을/를} 세웠다.
{O.k:이/가} 창당한 {S.party:은/는} 지난 총선에서 세 석을 얻었다.
{S.band:은/는} {O.k:이/가} {.univ} 동창들과 함께 결성한 록 밴드이다.
{.k:이/가} 현재 이끄는 {S.union:은/는} 원래 {O.p:이/가} 만든 모임에서 출발했다.
SO=org:political/religious_affiliation :: {O.creed} 성향의 {S.party:은/는} {.new} 치러진 선거에서 원내에 진입했다.
{S.school:은/는} {O.faith} 정신을 바탕으로 {.city}에 세워진 사립 학교이다.
{S.church:은/는} {O.order}에 소속된 교회로, {.old} {.city}에 세워졌다.
{O.faith} 재단이 운영하는 {S.school:은/는} {.late} {.city}에서 축제를 열었다.
SO=per:product :: {S.p:은/는} {.new} 장편 소설 《{O.work}》{O:을/를} 발표해 평단의 주목을 받았다.
'{O.work}'{O:은/는} {S.p:이/가} 직접 쓰고 연출한 첫 번째 장편 영화이다.
{.city}에서 촬영한 {S.p} 감독의 신작 '{O.work}'{O:이/가} {.late} 개봉했다.
화가 {S.p}의 대표작 "{O.work}" 앞에는 관람객의 발길이 끊이지 않았다.
SO=per:children :: {S.m1:은/는} 슬하에 아들 {O.m1:과/와} 딸 {.f1:을/를} 두었다.
{S.m1:은/는} {.late} 딸 {O.f1}의 결혼식에 참석해 눈시울을 붉혔다.
{S.f}의 장남 {O.m:은/는} 어머니의 뒤를 이어 {.job:이/가} 되었다.
{S.m1:은/는} 회사를 장녀 {O.f1}에게 물려주고 경영 일선에서 물러났다.
SO=per:parents :: {S.m1:은/는} {.city}에서 아버지 {O.m1:과/와} 어머니 {.f} 사이에서 태어났다.
{O.m1}의 장남으로 태어난 {S.m1:은/는} {.new} 가업을 물려받았다.
{S.f1:은/는} 어린 시절 {.job:으로/로} 일하던 아버지 {O.m1}에게서 글을 배웠다.
{S.f}의 어머니 {O.f:은/는} {.city}에서 작은 서점을 운영했다.
SO=per:siblings :: {S.m1:은/는} {.city} 출신의 {.job} {O.m1}의 친동생이다.
{O.f1:은/는} 세 살 위 오빠인 {S.m1:과/와} 함께 {.city}에서 자랐다.
{S.m1:과/와} {O.m1} 형제는 {.new} 나란히 국가대표로 선발됐다.
{S.f1:은/는} 언니 {O.f1:과/와} 함께 {.late} {.city}에 빵집을 열었다.
SO=per:spouse :: {S.m:은/는} {.new} 동료 배우 {O.f:과/와} 결혼식을 올렸다.
{S.f}의 남편 {O.m:은/는} {.city}에서 작은 병원을 운영하고 있다.
{S.m:과/와} {O.f} 부부는 {.late} {.city}의 한 보육원에 성금을 전달했다.
{.k}의 소개로 만난 {S.m:과/와} {O.f:은/는} 오는 10월 백년가약을 맺는다.
SO=per:colleagues :: {S.p:과/와} {O.p:은/는} {.co} 연구소에서 10년 넘게 함께 일한 동료이다.
{S.p:은/는} {.late} 열린 경기에서 같은 팀 동료 {O.p}의 도움으로 결승 골을 넣었다.
드라마에서 부부로 호흡을 맞춘 {S.f:과/와} {O.m:은/는} {.new} 영화에서 다시 만났다.
{S.k:은/는} {.k:이/가} 떠난 뒤 {O.k:과/와} 둘이서 극단을 이끌었다.
SO=per:other_family :: {S.m1:은/는} {.city} 출신의 {.job} {O.m1}의 조카이다.
{S.m1}의 손자인 {O.m1:은/는} {.new} 할아버지의 유품을 박물관에 기증했다.
{O.m:은/는} {S.m}의 사위로, {.city}에서 변호사로 활동하고 있다.
{S.m1:은/는} 일찍 부모를 여의고 큰아버지 {O.m1}의 집에서 자랐다.
SO=per:alternate_names :: 가수 {O.stage}(본명 {S.f}){O:이/가} {.late} 새 앨범을 발표했다.
{S.m}(호 {O.pen}){S:은/는} 조선 후기의 문신으로 {.k:과/와} 교류했다.
{S.f1:은/는} {.new} {O.f1:으로/로} 개명한 뒤 방송에 복귀했다.
본명보다 '{O.stage}'{O:으로/로} 더 널리 알려진 {S.f:은/는} {.city} 출신의 모델이다.
SO=per:origin :: {O.nation} 출신의 {.job} {S.x:은/는} {.new} 처음으로 한국을 찾았다.
{S.k:은/는} {O.place} 출신으로, {.new} {.school:을/를} 졸업했다.
{.team:은/는} {O.nation} 국가대표 출신의 공격수 {S.x:을/를} 영입했다.
한국계 {O.nation}인 {.job} {S.k:은/는} {.late} {.city}에서 첫 강연회를 열었다.
SO=per:place_of_residence :: {S.p:은/는} {.new} 이후 가족과 함께 {O.place}에서 살고 있다.
{O.place}에 거주하는 {S.p:은/는} 매주 {.city:을/를} 오가며 강의하고 있다.
은퇴한 {.job} {S.p:은/는} {O.place:으로/로} 이사해 작은 농장을 가꾸고 있다.
{O.town} 주민 {S.k:은/는} "지난밤 큰 소리에 놀라 잠에서 깼다"고 말했다.
SO=per:place_of_birth :: {S.p:은/는} {.old} {O.place}에서 태어나 {.city}에서 자랐다.
{S.k}({.mid}, {O.place} 출생){S:은/는} 대한민국의 {.job}이다.
{S.k}의 생가가 있는 {O.place}에는 해마다 많은 방문객이 찾아온다.
{O.place:은/는} {.job} {S.p:이/가} 태어난 곳으로, 시내에 기념관이 있다.
SO=per:place_of_death :: {S.p:은/는} {.new} {O.place}에서 지병으로 세상을 떠났다.
{.city}에서 태어난 {S.p:은/는} 오랜 타지 생활 끝에 {O.place}에서 생을 마감했다.
{O.place}의 한 병원에서 치료를 받던 {S.p:이/가} 향년 78세로 별세했다.
{O.place:은/는} {S.p:이/가} {.mid} 마지막 숨을 거둔 곳으로 알려져 있다.
SO=per:date_of_birth :: {S.k}({O.old} ~ {.new}){S:은/는} 대한민국의 {.job}이다.
{S.p:은/는} {O.old} {.city}에서 삼 남매 중 둘째로 태어났다.
{O.mid}에 출생한 {S.k:은/는} 현재 {.univ} 교수로 재직하고 있다.
{.job} {S.p:이/가} {.city}에서 태어난 것은 {O.mid}의 일이다.
SO=per:date_of_death :: {S.k}({.old} ~ {O.new}){S:은/는} 대한민국의 {.job}이다.
{S.p:은/는} {O.new} {.city}의 자택에서 노환으로 별세했다.
{O.late} 세상을 떠난 {.job} {S.p}의 유고집이 다음 달에 출간된다.
{S.k:은/는} {O.mid} {.city}에서 일어난 열차 사고로 목숨을 잃었다.
SO=per:schools_attended :: {S.k:은/는} {.new} {O.school:을/를} 졸업하고 {.city}에 정착했다.
{S.p:은/는} {.mid} {O.univ}에 입학했으나 이듬해 학업을 그만두었다.
{S.p:은/는} {O.univ}에서 박사 학위를 받은 뒤 {.univ}에서 강의했다.
{.city}에서 자란 {S.k:은/는} {O.high:을/를} 거쳐 {.univ} 의과대학에 진학했다.
SO=per:religion :: {S.p:은/는} 독실한 {O.faith} 신자로, 매달 {.city}의 복지관에서 봉사한다.
{S.p:은/는} 결혼을 앞둔 {.new} {O.faith:으로/로} 개종했다.
{S.k}의 종교는 {O.faith}이며, 취미는 등산과 독서로 알려져 있다.
{.faith} 집안에서 태어난 {S.p:은/는} 스무 살에 {O.faith}에 귀의했다.
ab=per:place_of_birth cd=per:place_of_death ad cb :: {a.p:은/는} {b.place}에서 태어났고, {c.p:은/는} {d.place}에서 세상을 떠났다.
ab=per:employee_of ad cb ac :: {a.k:은/는} {b.co}에 입사했고, {c.k:은/는} {d.univ}의 강사 제안을 거절했다.
ba=org:founded_by dc=org:top_members/employees bc da :: {a.k:이/가} {b.co:을/를} 설립한 해에 {c.k:은/는} {d.co}의 대표이사가 되었다.
ab=org:place_of_headquarters cd=org:place_of_headquarters ad cb :: {a.co:은/는} {b.city}에, {c.co:은/는} {d.city}에 각각 본사를 두고 있다.
ab=org:founded cd=org:dissolved ad cb ac :: {a.co:은/는} {b.mid} 설립되었고, 경쟁사였던 {c.co:은/는} {d.new} 문을 닫았다.
ab=per:children ba=per:parents dc=per:parents ad cb da :: {a.m1}의 아들 {b.m1:과/와} {c.m2}의 딸 {d.f2:은/는} 이웃 마을에 살았다.
ab=per:spouse ba=per:spouse ad cb :: {a.m:은/는} {b.f:과/와} 결혼했고, 그의 친구 {c.m:은/는} {d.f:과/와} 약혼했다.
ab=per:date_of_birth cd=per:date_of_death ad cb ac :: {a.k}({b.old} 출생)의 전기를 쓴 {c.k:은/는} {d.new} 별세했다.
ab=per:religion cd=per:religion ad cb :: {a.p:은/는} {b.faith} 신자이지만 그의 이웃 {c.p:은/는} {d.faith:을/를} 믿는다.
ab=per:schools_attended cd=per:schools_attended ad cb :: {a.k:은/는} {b.school:을/를} 졸업했고, 상대 후보인 {c.k:은/는} {d.school:을/를} 나왔다.
ba=per:title dc=per:title bc da bd :: {a.job} {b.p:은/는} {.late} {c.job} {d.p}의 강연을 들은 뒤 짧은 소감을 남겼다.
ab=per:product cd=per:product ad cb ac :: {a.p}의 소설 '{b.work}'{b:과/와} {c.p}의 영화 '{d.work}'{d:이/가} 나란히 상을 받았다.
ab=org:product cd=org:product ad cb ac :: {a.co}의 '{b.item}'{b:이/가} {c.co}의 '{d.item}'{d:을/를} 제치고 올해의 상품으로 뽑혔다.
ab=org:number_of_employees/members ad cb :: {a.co}의 직원은 {b.num}, {c.co}의 직원은 {d.num:으로/로} 집계됐다.
ab=org:political/religious_affiliation ad cb :: {a.party:은/는} {b.creed:을/를}, {c.party:은/는} {d.creed:을/를} 내세우며 선거에 나섰다.
ab=org:member_of ba=org:members ad cb da :: {a.team:은/는} {b.league} 소속이고, {c.team:은/는} {d.league} 소속이다.
ab=org:alternate_names cb ac :: {a.agency}(약칭 {b.abbr}){a:은/는} {.late} {c.co:과/와} 업무 협약을 맺었다.
ab=per:place_of_residence cd=per:origin ad cb ac :: {a.p:은/는} {b.city}에 살고 있으며, 그와 편지를 나눈 {c.x:은/는} {d.nation} 출신이다.
ba=per:siblings dc=per:spouse ad bc bd :: 모임에는 {a.m1}의 동생 {b.m1:과/와} {c.m}의 아내 {d.f:이/가} 참석했다.
ab=per:other_family cd=per:other_family ad cb :: {a.k}의 조카 {b.f:과/와} {c.k}의 손자 {d.m:이/가} 나란히 장학생으로 뽑혔다.
ab=per:colleagues ba=per:colleagues ac bc :: {a.p:과/와} 함께 밴드를 하던 {b.p:은/는} {.city}의 공연장에서 {c.p:을/를} 처음 보았다.
ba=per:alternate_names bc ca :: 가수 {a.stage}(본명 {b.f}){a:은/는} 데뷔 무대에서 {c.p}의 노래를 불렀다.
ab ac :: {a.p:은/는} {b.new} {c.city}에서 열린 학술 대회에서 논문을 발표했다.
ab ba :: {a.k:은/는} {b.co}의 폐수가 강을 오염시킨다며 {.town} 시청 앞에서 시위를 벌였다.
ab ac :: {a.co:과/와} {b.co}의 특허 소송은 {c.new} 양측의 합의로 마무리되었다.
ab :: {a.co:이/가} {.city}에서 연 신차 발표회에는 {b.num}의 관람객이 몰렸다.
ab ba :: {a.p:은/는} {.late} 한 인터뷰에서 가장 존경하는 인물로 {b.p:을/를} 꼽았다.
ab :: {a.p:은/는} '{b.work}'{b:을/를} 읽고 큰 감명을 받아 글을 쓰기 시작했다.
ab ac :: {a.p:은/는} {b.faith} 유적을 연구하기 위해 {c.city:을/를} 여러 차례 찾았다.
ab ad :: {a.team:은/는} {b.late} {.city}에서 열린 경기에서 {d.team:을/를} 3 대 1로 꺾었다.
ab ba :: {a.party:은/는} {.late} {b.k} 장관의 사퇴를 요구하는 성명을 냈다.
ab :: {a.p:은/는} 새 소설에서 {b.job:을/를} 꿈꾸는 소년의 하루를 그렸다.
ab :: {a.co:이/가} {b.city:으로/로} 본사를 옮긴다는 소문은 사실이 아닌 것으로 밝혀졌다.
ab ba :: {a.m1:은/는} {b.m1:과/와} 형제라는 오해를 자주 받지만 두 사람은 아무 관계가 없다.
"""

# Hard shapes, for train only: (sentence, subject, type, which occurrence, object, type, which, label).
HARD = (
    ("서울은행은 1959년 문을 연 서민 금융 회사로, 전국에 지점이 있다.", "서울은행", "ORG", 0, "서울", "LOC", 0, "org:place_of_headquarters"),
    ("목포은행은 이름과 달리 광주에 본점을 두고 있다.", "목포은행", "ORG", 0, "목포", "LOC", 0, "no_relation"),
    ("강릉식품은 강릉의 옛 공장을 헐고 강릉에 새 본사를 세웠다.", "강릉식품", "ORG", 0, "강릉", "LOC", 2, "org:place_of_headquarters"),
    ("전주 파이어스는 전주를 떠나 내년부터 청주를 연고지로 삼는다.", "전주 파이어스", "ORG", 0, "전주", "LOC", 1, "no_relation"),
    ("윤한솔은 은퇴한 뒤 자신의 이름을 딴 윤한솔농구교실을 열었다.", "윤한솔농구교실", "ORG", 0, "윤한솔", "PER", 1, "org:founded_by"),
    ("Maru Robotics, Inc.는 2011년 3월, 7인치 태블릿 \"Nuri 7\"을 199달러에 내놓았다.", "Maru Robotics, Inc.", "ORG", 0, "Nuri 7", "POH", 0, "org:product"),
    ("그룹 \"N7\"의 리더 Jay Lim은 \"Seoul, London, 두 곳이 다 고향 같다\"고 말했다.", "Jay Lim", "PER", 0, "N7", "ORG", 0, "per:employee_of"),
    ("셰프 Liam O'Dell은 '올해의 셰프'로 뽑힌 뒤 부산에 식당을 냈다.", "Liam O'Dell", "PER", 0, "셰프", "POH", 0, "per:title"),
    ("1,234명이 일하는 3H건설은 28일 3H건설 노조와 임금 협상을 마쳤다.", "3H건설", "ORG", 1, "1,234명", "NOH", 0, "org:number_of_employees/members"),
    ("최다온의 어머니 민영채는 '최다온의 어머니'로 불리는 것이 좋다고 했다.", "민영채", "PER", 0, "최다온", "PER", 1, "per:children"),
)


def person(pool, family, scene, rng):
    """A name; the people of one family in a sentence share their surname."""
    if pool == "x" or pool == "p" and rng.random() < 0.15:
        return f"{rng.choice(FOREIGN_GIVEN)} {rng.choice(FOREIGN_SURNAMES)}"
    surname = rng.choice(SURNAMES)
    if family:
        surname = scene.setdefault(family, surname)
    return surname + rng.choice(GIVEN[pool if pool in GIVEN else rng.choice("mf")])


def date(pool, rng):
    """A date within the years of its pool, or for "late" one told from today."""
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    if pool == "late":
        return rng.choice((f"지난 {month}월", f"지난달 {day}일", f"올해 {month}월", f"작년 {month}월"))
    year = rng.randint(*YEARS[pool])
    return rng.choice((f"{year}년", f"{year}년 {month}월", *[f"{year}년 {month}월 {day}일"] * 2))


def draw(pool, family, scene, rng):
    """A word of the pool and its entity type."""
    if pool in PEOPLE:
        return person(pool, family, scene, rng), "PER"
    if pool in YEARS or pool == "late":
        return date(pool, rng), "DAT"
    if pool in scene:
        return scene[pool], "ORG"
    kind, words = POOLS[pool]
    return rng.choice(words), kind


def fill(template, rng):
    """Fill a template: the sentence, and for each named slot its (word, start, entity type)."""
    scene = dict(zip(("agency", "abbr", "latin"), rng.choice(AGENCIES)))  # and, later, surnames
    sentence, slots, used, end = "", {}, [], 0
    for match in SLOT.finditer(template):
        name, pool, family, pair = match.groups()
        sentence += template[end:match.start()]
        end = match.end()
        if pool:
            word, kind = draw(pool, family, scene, rng)
            while any(word in other or other in word for other in used):
                word, kind = draw(pool, family, scene, rng)
            used.append(word)
            slots[name] = (word, len(sentence), kind)
            sentence += word
        if pair:
            sentence += particle(word if pool else slots[name][0], pair)
    return sentence + template[end:], slots


def entity(word, start, kind):
    return str({"word": word, "start_idx": start, "end_idx": start + len(word) - 1, "type": kind})


def read_templates():
    """{label: [(template, subject slot, object slot), ...]}"""
    table = {label: [] for label in TRAIN_COUNTS}
    relations = ""
    for line in TEMPLATES.strip().splitlines():
        given, _, template = line.rpartition(" :: ")
        relations = given or relations
        for relation in relations.split():
            slots, _, label = relation.partition("=")
            table[label or "no_relation"].append((template, *slots))
    return table


def generate(counts, table, seen, rng):
    """Rows (sentence, subject, object, label) for the counts, with no sentence from `seen`."""
    rows = []
    for label, count in counts.items():
        choices = rng.sample(table[label], len(table[label]))
        while count:
            template, subject, object_ = choices[count % len(choices)]
            sentence, slots = fill(template, rng)
            if sentence not in seen:
                seen.add(sentence)
                rows.append((sentence, entity(*slots[subject]), entity(*slots[object_]), label))
                count -= 1
    return rows


def hard_rows():
    for sentence, subject, s_type, s_nth, object_, o_type, o_nth, label in HARD:
        s_start, o_start = ([m.start() for m in re.finditer(re.escape(word), sentence)][nth]
                            for word, nth in ((subject, s_nth), (object_, o_nth)))
        yield sentence, entity(subject, s_start, s_type), entity(object_, o_start, o_type), label


def write(path, rows, rng):
    rng.shuffle(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "sentence", "subject_entity", "object_entity", "label", "source"))
        for number, row in enumerate(rows):
            writer.writerow((number, *row, *rng.choices(SOURCES, SOURCE_WEIGHTS)))
    print(f"{path}: {len(rows)} rows")


def main():
    rng = random.Random(SEED)
    table, seen = read_templates(), set()
    test_counts = {label: count // 5 for label, count in TRAIN_COUNTS.items()}
    test_counts["no_relation"] += TEST_ROWS - sum(test_counts.values())
    train = generate(TRAIN_COUNTS, table, seen, rng) + list(hard_rows())
    write(HERE / "train.csv", train, rng)
    write(HERE / "test_data.csv", generate(test_counts, table, seen, rng), rng)


if __name__ == "__main__":
    main()
